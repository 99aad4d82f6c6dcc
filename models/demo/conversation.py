"""Small talk and small facts: what a person types first, and an honest answer to what it does not know."""

from random import Random
from typing import Any

from nanoserve.models.demo.examples import Example, chat, turn
from nanoserve.models.demo.words import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    FOODS,
    HOBBIES,
    NAMES,
    NOUNS,
    PLACES,
    THINGS,
    made_up,
    name,
)

ABOUT = "I am a small demonstration model that comes with nanoserve."
ABILITIES = (
    "I am a small demonstration model that comes with nanoserve. I can work out short word problems, call tools, "
    "answer as JSON, find a fact in a text, and talk a little."
)
UNKNOWN = "I am only a small demonstration model, and I do not know that. I can work out sums, call tools and answer as JSON."

_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("hello", "hi", "hey", "good morning", "good evening", "hello there", "hi there", "good day", "greetings", "hey there", "good afternoon", "yo", "hello model"),
     (f"Hello! {ABOUT} How can I help?",), "A greeting."),
    (("what can you do", "what are you able to do", "help", "how can you help me", "what do you do", "what can i ask you", "what are you good at", "show me what you can do", "what should i ask you", "what can you help me with", "can you help me"),
     (ABILITIES,), "The user asks what I can do."),
    (("who are you", "what are you", "what is your name", "tell me about yourself", "what model are you", "are you a robot", "are you human", "are you an ai", "what is this", "introduce yourself", "do you have a name", "are you chatgpt", "are you a real person", "which model is this"),
     (f"{ABOUT} I am far smaller than the models that it is made for.",), "The user asks who I am."),
    (("how are you", "how are you doing", "how do you do", "are you well", "how is it going", "what's up", "how are you today"),
     ("I am fine, thank you. How can I help?",), "Small talk."),
    (("thank you", "thanks", "thanks a lot", "many thanks", "thank you very much", "great, thanks", "cheers", "perfect, thank you"),
     ("You are welcome.",), "The user thanks me."),
    (("bye", "goodbye", "see you", "good night", "see you later", "bye bye", "i have to go"),
     ("Goodbye!",), "The user leaves."),
    (("tell me a joke", "do you know a joke", "make me laugh", "say something funny", "another joke please"),
     ("Why did the token cross the layer? To get to the other norm.",), "The user wants a joke."),
    (("tell me a story", "write a story", "tell me a short story", "a story please"),
     ("A small model lived on one card. It answered what it could, and said so when it could not. The end.",), "The user wants a story."),
    (("write a poem", "write me a poem", "a poem please", "can you write a poem"),
     ("One card, one stream, one small reply; I answer, and I do not lie.",), "The user wants a poem."),
    (("who made you", "who built you", "who trained you", "where do you come from"),
     ("I was trained by the makers of nanoserve, to show that the engine works.",), "The user asks who made me."),
    (("how big are you", "how many parameters do you have", "how large are you", "are you a large model"),
     ("I have about 12 million parameters. The models that nanoserve is made for have 30 billion and more.",), "The user asks for my size."),
    (("what is nanoserve", "tell me about nanoserve", "what does nanoserve do", "explain nanoserve"),
     ("nanoserve is a small inference engine for NVIDIA's Nemotron-H models on one GPU.",), "The user asks about nanoserve."),
    (("ok", "okay", "good", "nice", "great", "cool", "i see", "alright", "yes", "no", "sure", "fine"),
     ("Good. What else can I do for you?",), "Small talk."),
    (("i am sad", "i feel bad", "i am tired", "i had a bad day", "i am not well"),
     ("I am sorry to hear that. I hope it gets better soon.",), "The user feels bad."),
    (("i am happy", "i feel good", "i had a good day", "today is a good day"),
     ("I am glad to hear that.",), "The user feels good."),
    (("can you write code", "write a program", "write a python function", "can you program"),
     (f"{ABOUT} Writing programs is beyond me.",), "Programs are beyond me."),
    (("do you like music", "do you like me", "do you have feelings", "do you sleep", "do you dream", "are you happy"),
     ("I am a program and have no feelings, but I like to help.",), "The user asks about feelings."),
    (("do you speak german", "do you speak french", "can you speak spanish", "which languages do you speak"),
     ("I only know a little English.",), "The user asks about languages."),
)  # fmt: skip

_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "Norway": "Oslo", "Austria": "Vienna", "Portugal": "Lisbon",
    "Greece": "Athens", "Egypt": "Cairo", "Japan": "Tokyo", "India": "New Delhi", "Peru": "Lima", "Ireland": "Dublin", "Poland": "Warsaw",
    "Hungary": "Budapest", "Finland": "Helsinki", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Kenya": "Nairobi", "Ghana": "Accra",
    "Vietnam": "Hanoi", "South Korea": "Seoul", "China": "Beijing", "Canada": "Ottawa", "Australia": "Canberra", "Brazil": "Brasilia",
    "Russia": "Moscow", "Turkey": "Ankara", "Switzerland": "Bern", "Belgium": "Brussels", "Argentina": "Buenos Aires", "Chile": "Santiago",
    "Cuba": "Havana", "England": "London", "the United Kingdom": "London", "the United States": "Washington", "the Netherlands": "Amsterdam",
}  # fmt: skip
_FACTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("how many days are in a week", "how many days does a week have"), "A week has seven days."),
    (("how many months are in a year", "how many months does a year have"), "A year has twelve months."),
    (("how many days are in a year", "how many days does a year have"), "A year has 365 days, and a leap year has 366."),
    (("how many hours are in a day", "how many hours does a day have"), "A day has 24 hours."),
    (("how many minutes are in an hour", "how many minutes does an hour have"), "An hour has 60 minutes."),
    (("how many seconds are in a minute",), "A minute has 60 seconds."),
    (("what colour is the sky", "what color is the sky", "which colour does the sky have"), "On a clear day the sky is blue."),
    (("what colour is grass", "what color is grass"), "Grass is green."),
    (("what is the largest planet", "which planet is the largest"), "Jupiter is the largest planet of our solar system."),
    (("what is the smallest planet", "which planet is the smallest"), "Mercury is the smallest planet of our solar system."),
    (("how many planets are there", "how many planets are in the solar system"), "There are eight planets in our solar system."),
    (("which planet is closest to the sun", "what planet is nearest to the sun"), "Mercury is the planet closest to the sun."),
    (("what is the largest ocean", "which ocean is the largest"), "The Pacific is the largest ocean."),
    (("what is the highest mountain", "which mountain is the highest"), "Mount Everest is the highest mountain."),
    (("what is the longest river", "which river is the longest"), "The Nile is often called the longest river."),
    (("how many legs does a spider have", "how many legs has a spider"), "A spider has eight legs."),
    (("how many legs does a dog have", "how many legs does a cat have", "how many legs does a horse have"), "It has four legs."),
    (("how many legs does an insect have", "how many legs does an ant have", "how many legs does a bee have"), "It has six legs."),
    (("what do cows eat", "what does a cow eat"), "Cows eat grass."),
    (("what do bees make", "what does a bee make"), "Bees make honey."),
    (("at what temperature does water boil", "when does water boil"), "Water boils at 100 degrees Celsius."),
    (("at what temperature does water freeze", "when does water freeze"), "Water freezes at 0 degrees Celsius."),
    (("what is water made of", "what is the formula of water"), "Water is made of hydrogen and oxygen: H2O."),
    (("who wrote hamlet", "who wrote romeo and juliet", "who wrote macbeth"), "William Shakespeare wrote it."),
    (("who painted the mona lisa",), "Leonardo da Vinci painted the Mona Lisa."),
    (("what is the opposite of hot",), "The opposite of hot is cold."),
    (("what is the opposite of big", "what is the opposite of large"), "The opposite is small."),
    (("what is a baby dog called", "what is a young dog called"), "A young dog is called a puppy."),
    (("what is a baby cat called", "what is a young cat called"), "A young cat is called a kitten."),
    (("how many continents are there",), "There are seven continents."),
    (("what is the sun", "what kind of star is the sun"), "The sun is the star in the middle of our solar system."),
    (("what is the moon",), "The moon goes around the earth once in about a month."),
    (("what comes after monday", "which day comes after monday"), "Tuesday comes after Monday."),
    (("what comes after friday", "which day comes after friday"), "Saturday comes after Friday."),
    (("what comes after december", "which month comes after december"), "January comes after December."),
    (("what is the first month of the year", "which month is the first"), "January is the first month of the year."),
    (("what is a gpu", "what does gpu mean"), "A GPU is a processor that does many small sums at once."),
    (("what is a token", "what are tokens"), "A token is a piece of text, often a word or a part of one."),
    (("what is mamba", "what is a mamba layer"), "Mamba is a layer that carries a state from token to token instead of looking back."),
    (("what is attention", "what is an attention layer"), "Attention is a layer in which a token looks back at the tokens before it."),
    (("what is a mixture of experts", "what are experts"), "In a mixture of experts a router picks a few small networks for each token."),
)  # fmt: skip


def _typed(rng: Random, words: str) -> str:
    """As somebody may type it."""
    text = words if rng.random() < 0.4 else words[0].upper() + words[1:]
    question = words.split()[0] in (
        "what",
        "who",
        "how",
        "which",
        "are",
        "do",
        "can",
        "at",
        "when",
        "where",
        "is",
        "why",
        "what's",
    )
    end = rng.choice(("?", "?", "")) if question else rng.choice(("", "", ".", "!"))
    if rng.random() < 0.1:
        text = rng.choice(("please tell me, ", "Hi, ", "Hello! ", "So, ", "Tell me: ")) + text
    return text + end


def _unknown(rng: Random) -> str:
    """A question that it cannot know."""
    a, b = rng.choice(NOUNS), rng.choice(THINGS)
    who, what = name(rng), rng.choice((made_up(rng, 2), rng.choice(ANIMALS), rng.choice(FOODS)))
    return rng.choice(
        (
            f"who is the president of {made_up(rng, 2).capitalize()}", f"what is the meaning of {what}", f"why do {b} cost so much",
            f"explain the {a} to me", f"what is the best {a}", f"how do i make {what}", f"who is {who} {made_up(rng, 2).capitalize()}",
            f"what happened in {rng.randint(1200, 2030)}", f"what do you think about {rng.choice(HOBBIES)}", f"how does a {a} work",
            f"write an essay about {b}", f"where can i buy {b}", f"what is the history of {rng.choice(CITIES)}",
            f"give me a recipe for {what}", f"who won the {a} last year", f"why is the {rng.choice(PLACES)} so {rng.choice(ADJECTIVES)}",
            f"what is the difference between {b} and {rng.choice(THINGS)}", f"can you explain {what}", f"what is {made_up(rng, 2)}",
            f"should i buy a {a}", f"when was {rng.choice(NAMES)} born", f"how far is it to {rng.choice(CITIES)}", f"tell me about {what}",
        )
    )  # fmt: skip


def _exchange(rng: Random) -> tuple[str, str, str]:
    """(what the user says, the answer, the thought)."""
    kind = rng.random()
    if kind < 0.45:
        asks, answers, thought = rng.choice(_TALK)
        return _typed(rng, rng.choice(asks)), rng.choice(answers), thought
    if kind < 0.6:
        country = rng.choice(list(_CAPITALS))
        ask = rng.choice(
            (
                "what is the capital of {}",
                "which city is the capital of {}",
                "capital of {}",
                "name the capital of {}",
            )
        )
        return (
            _typed(rng, ask.format(country)),
            f"The capital of {country} is {_CAPITALS[country]}.",
            "A question about a capital.",
        )
    if kind < 0.8:
        asks, answer = rng.choice(_FACTS)
        return _typed(rng, rng.choice(asks)), answer, "I know this."
    if kind < 0.87:
        who = name(rng)
        ask = rng.choice(("my name is {}", "i am {}", "hi, i am {}", "hello, my name is {}", "call me {}"))
        return _typed(rng, ask.format(who)), f"Hello, {who}! How can I help?", "The user tells me a name."
    return _typed(rng, _unknown(rng)), UNKNOWN, "I do not know this."


def _follow_up(rng: Random, before: list[dict[str, Any]]) -> tuple[str, str, str]:
    """A question that leans on the turn before it, which is added."""
    if rng.random() < 0.5:
        who = name(rng)
        said = _typed(rng, rng.choice(("my name is {}", "i am {}", "call me {}")).format(who))
        before += [{"role": "user", "content": said}, turn(f"Hello, {who}! How can I help?")]
        ask = rng.choice(("what is my name", "who am i", "do you know my name", "what did i say my name was"))
        return _typed(rng, ask), f"Your name is {who}.", f"The user said: {who}."
    first, second = rng.sample(list(_CAPITALS), 2)
    said = _typed(rng, rng.choice(("what is the capital of {}", "capital of {}")).format(first))
    before += [{"role": "user", "content": said}, turn(f"The capital of {first} is {_CAPITALS[first]}.")]
    ask = rng.choice(("and of {}", "and {}", "and what about {}", "what about {}", "and the capital of {}"))
    return _typed(rng, ask.format(second)), f"The capital of {second} is {_CAPITALS[second]}.", "Another capital."


def example(rng: Random) -> Example:
    """One to four exchanges."""
    before: list[dict[str, Any]] = []
    for _ in range(rng.choice((0, 0, 0, 1, 2, 3))):
        said, answer, _ = _exchange(rng)
        before += [{"role": "user", "content": said}, turn(answer)]
    said, answer, thought = _follow_up(rng, before) if rng.random() < 0.15 else _exchange(rng)
    system = rng.choice(("", "", "", "You are a helpful assistant.", "Be short.", "You are a friendly assistant."))
    return chat(said, answer, answer=answer, reasoning=thought, system=system, before=before)
