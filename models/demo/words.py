"""The words that the demo's texts are made of, and names that no list holds."""

from collections.abc import Sequence
from random import Random

NAMES: Sequence[str] = (
    "Anna Ben Clara David Ella Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Wendy "
    "Yusuf Zoe Amir Bella Carlos Diana Emil Fatima George Hanna Ivan Julia Karim Lucy Marco Nina Oscar Petra Quinn "
    "Ravi Sofia Tom Uma Vera Will Xenia Yara Zack Alice Bruno Chen Dora Erik Fiona Gino Helga Igor Jane Kenji Lena "
    "Maria Nora Omar Priya Robert Sara Theo Ursula Vlad Walter Ximena Yves Zara Natalia Betty Mark James Emma Liam"
).split()
CITIES: Sequence[str] = (
    "Paris Berlin Rome Madrid Oslo Vienna Lisbon Prague Dublin Athens Cairo Tokyo Delhi Lima Quito Boston Chicago "
    "Denver Seattle Austin Toronto Sydney Perth Nairobi Lagos Accra Hanoi Seoul Beijing Mumbai Zurich Geneva Milan "
    "Naples Munich Hamburg Lyon Porto Krakow Warsaw Budapest Helsinki Stockholm Copenhagen Bergen London York Bath"
).split()
THINGS: Sequence[str] = (
    "apples pears plums lemons oranges marbles stickers stamps coins cards books pencils pens crayons buttons shells "
    "stones beads cookies muffins cakes rolls eggs tomatoes potatoes carrots onions roses tulips candles cups plates "
    "spoons balls kites toys blocks photos tickets badges ribbons nails screws bricks boxes bottles jars chairs lamps "
    "clips bags socks shirts hats scarves gloves posters magazines notebooks folders erasers rulers"
).split()
THING: Sequence[str] = (
    "apple pear plum lemon orange marble sticker stamp coin card book pencil pen crayon button shell stone bead cookie "
    "muffin cake roll egg tomato potato carrot onion rose tulip candle cup plate spoon ball kite toy block photo ticket "
    "badge ribbon nail screw brick box bottle jar chair lamp clip bag sock shirt hat scarf glove poster magazine "
    "notebook folder eraser ruler"
).split()
COLOURS: Sequence[str] = "red blue green yellow white black brown pink grey purple orange golden silver".split()
ADJECTIVES: Sequence[str] = (
    "old new small large quiet bright dark cold warm round square narrow wide hidden broken wooden iron northern "
    "southern eastern western upper lower first second third secret empty heavy little distant ancient royal plain"
).split()
PLACES: Sequence[str] = (
    "vault gate tower bridge garden library cellar cabinet harbour station museum temple workshop kitchen office "
    "warehouse lighthouse archive studio chapel market school theatre palace cottage stable mill tunnel castle depot"
).split()
ANIMALS: Sequence[str] = (
    "cat dog horse cow goat sheep duck hen fox wolf bear owl crow mouse rabbit frog snake turtle bee ant".split()
)
JOBS: Sequence[str] = (
    "baker farmer teacher doctor nurse painter singer writer driver pilot sailor tailor cook gardener lawyer carpenter "
    "plumber librarian fisher miner guard clerk judge dancer actor engineer chemist barber potter smith"
).split()
HOBBIES: Sequence[str] = (
    "chess tennis swimming painting cooking reading hiking running cycling dancing singing fishing knitting sailing "
    "skiing pottery photography gardening yoga football"
).split()
FOODS: Sequence[str] = (
    "bread cheese soup rice pasta salad pizza curry honey tea coffee milk juice cake pie fish beans noodles".split()
)
LANGUAGES: Sequence[str] = (
    "English French German Spanish Italian Dutch Polish Greek Arabic Hindi Korean Turkish Swedish".split()
)
DAYS: Sequence[str] = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS: Sequence[str] = (
    "January February March April May June July August September October November December"
).split()
NOUNS: Sequence[str] = (
    "invoice report ticket order file folder message note task event meeting room table seat flight hotel train taxi "
    "parcel package letter photo song playlist video recipe lesson course exam grade account payment transfer budget "
    "loan card device light heater fan door window camera alarm timer sensor printer server database backup user team "
    "project budget contract customer product price stock shelf garden plant pet vehicle route map trip ticket review "
    "survey poll vote message channel post comment article page site link form label tag stamp badge token key"
).split()
VERBS: Sequence[str] = (
    "create delete update find search list open close start stop send move copy rename cancel book reserve order buy "
    "sell check count convert measure translate print scan upload download play pause share rate review approve reject "
    "assign schedule remind lock unlock enable disable add remove merge split sort export import archive restore track"
).split()
TOPICS: Sequence[str] = (
    "title subject label colour owner city street floor amount limit size weight height width length speed level volume "
    "age year month day hour minute count quantity price total discount score rating priority status category language "
    "currency unit format mode color brand model author artist genre theme style phone email code number name place "
    "reason note message text query tag group role country region zone address guests nights seats copies pages"
).split()

_ONSETS: Sequence[str] = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk sl st t th tr v w z".split()
_VOWELS: Sequence[str] = "a e i o u ai ea ee ia io oa oo ou".split()
_CODAS: Sequence[str] = ["", "", "", *"b ck d g k l ll m n nd ng nk nt p r rk rn s ss st t th x z".split()]


def made_up(rng: Random, syllables: int | None = None) -> str:
    """A word that is in no list, in lower case: what teaches copying rather than knowing."""
    count = syllables or rng.choice((1, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))


def name(rng: Random) -> str:
    """A first name; one in three is made up."""
    return rng.choice(NAMES) if rng.random() < 0.67 else made_up(rng, rng.choice((1, 2, 2))).capitalize()


def names(rng: Random, count: int) -> list[str]:
    """Different first names."""
    found: Sequence[str] = []
    while len(found) < count:
        one = name(rng)
        if one not in found:
            found.append(one)
    return found


def city(rng: Random) -> str:
    """A city; one in four is made up."""
    return rng.choice(CITIES) if rng.random() < 0.75 else made_up(rng, 2).capitalize()


def code(rng: Random) -> str:
    """Three to six digits, or letters and digits."""
    if rng.random() < 0.7:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 6)))
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}{'-' if rng.random() < 0.5 else ''}{rng.randint(10, 9999)}"


def date(rng: Random) -> str:
    """A date as 2026-05-03."""
    return f"20{rng.randint(20, 39)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def clock(rng: Random) -> str:
    """A time of day as 14:30."""
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"
