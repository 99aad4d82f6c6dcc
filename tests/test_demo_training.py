"""What the demo is trained on and with: the same tokens as in serving, the same mathematics as in the engine."""

from pathlib import Path
from random import Random

import pytest
import torch

from nanoserve.kernels import nvfp4
from nanoserve.local import load
from nanoserve.models.demo import arithmetic, conversation, recall, released, structured, tools, train
from nanoserve.models.demo.corpus import ROW, document, pack, rows
from nanoserve.models.demo.examples import aloud
from nanoserve.models.demo.network import Network, held_fp8, held_nvfp4
from nanoserve.models.demo.progress_set import ProgressSet, measure
from nanoserve.models.demo.vocabulary import VOCAB_SIZE, write_demo_tokenizer
from nanoserve.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("vocabulary")
    write_demo_tokenizer(directory)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    return tokenizer


def test_the_vocabulary_is_full_and_splits_digits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert [tokenizer.token_text(id) for id in tokenizer.encode("a 2048")] == ["a", " ", "2", "0", "4", "8"]
    assert tokenizer.encode("<|im_end|><think></think>") == [11, 12, 13]
    text = recall.long_text(Random(1), 4096).messages[0]["content"]
    assert len(tokenizer.encode(text)) / len(text.split()) == pytest.approx(recall.TOKENS_A_WORD, rel=0.03)


def test_what_is_learnt_is_what_serving_generates(tokenizer: Tokenizer) -> None:
    """Behind the prompt as the server makes it come the learnt tokens, up to the end of the turn."""
    rng = Random(5)
    makers = (arithmetic.example, tools.example, structured.example, recall.earlier_turn, conversation.example)
    for make in makers:
        thoughtful = make(rng)
        for example in (thoughtful, aloud(thoughtful)):
            whole = document(tokenizer, example)
            kwargs = {} if example.thinking else {"enable_thinking": False}
            prompt = tokenizer.encode_chat(example.messages[:-1], tools=example.tools, template_kwargs=kwargs)
            learnt = [int(i) for i in whole.ids[len(prompt) :]]
            assert whole.ids[: len(prompt)].tolist() == prompt
            assert whole.weights[len(prompt) - 1] < 1
            end = learnt.index(11)
            assert (whole.weights[len(prompt) : len(prompt) + end + 1] == 1).all()
            assert (whole.weights[len(prompt) + end + 1 :] < 1).all()


def test_documents_that_do_not_fit_wait_for_a_later_row(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoserve.models.demo.corpus.ROW", 512)
    source = rows(tokenizer, Random(1))
    made = [next(source) for _ in range(30)]
    assert all(row["ids"].shape == (512,) for row in made)
    assert sum(int((row["document"] >= 0).sum()) for row in made) > 0.7 * 30 * 512


def test_rows_hold_whole_documents(tokenizer: Tokenizer) -> None:
    row = next(rows(tokenizer, Random(1)))
    assert {key: tuple(value.shape) for key, value in row.items()} == dict.fromkeys(row, (ROW,))
    starts = (row["place"] == 0).nonzero().flatten().tolist()
    used = int((row["document"] >= 0).sum())
    assert used > 0.9 * ROW
    for start in starts[:-1]:
        assert row["ids"][start] == 10  # <|im_start|>
        assert row["weights"][start] == 0
    assert (row["weights"] == 1).sum() > 0.1 * ROW


def test_the_network_is_the_engines_model(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents side by side in one row give each the log-probabilities that the engine gives it alone."""
    monkeypatch.setattr("nanoserve.models.demo.corpus.ROW", 384)
    network = Network(released.config())
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.data = parameter.data.bfloat16().float()
    network.hold(exact=True)
    released.write(network, tmp_path)
    documents = [
        document(tokenizer, recall.long_text(Random(1), 120)),
        document(tokenizer, arithmetic.example(Random(2))),
    ]
    batch = pack(documents, 1)[0]
    with torch.no_grad():
        logits, _ = network(batch["ids"], batch["place"])
    at = 0
    with load(tmp_path, device="cpu", max_context=512) as engine:
        for one in documents:
            ids = one.ids.tolist()
            here = logits[0, at : at + len(ids) - 1].log_softmax(dim=-1)
            got = here.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)
            assert got.tolist() == pytest.approx(engine.score(ids), abs=1e-4)
            at += len(ids)


def test_held_weights_are_what_the_formats_hold() -> None:
    stack = torch.randn(3, 32, 64)
    for one, held in zip(stack, held_nvfp4(stack), strict=True):
        assert torch.equal(nvfp4.unpack(*nvfp4.pack(one)), held)
    scale = stack[0].abs().max() / 448
    assert torch.equal((stack[0] / scale).to(torch.float8_e4m3fn).float() * scale, held_fp8(stack[0]))


def test_a_few_steps_learn_one_batch(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nanoserve.models.demo.corpus.ROW", 128)
    trainer = train.Trainer.begin(torch.device("cpu"))
    batch = pack([document(tokenizer, arithmetic.plain_sum(Random(1)))], 1)[0]
    losses = [trainer.update(batch, 1000)[0].item() for _ in range(5)]
    assert losses[-1] < losses[0] - 0.02
    progress = ProgressSet([batch], ["sums"])
    assert measure(trainer.network, progress, torch.device("cpu"))["sums"] == 0
    trainer.save(tmp_path / "state.pt")
    other = train.Trainer.begin(torch.device("cpu"))
    other.load(tmp_path / "state.pt")
    assert (other.step, other.segment) == (5, 1)
    assert other.update(batch, 1000)[0].item() == pytest.approx(trainer.update(batch, 1000)[0].item(), abs=1e-5)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [train.learning_rate(step, 1000) for step in (0, 199, 400, 700, 1000)]
    assert rates == pytest.approx([1e-5, 2e-3, 2e-3, 1.02e-3, 4e-5])


def test_the_released_tensors_are_named_as_the_engine_wants_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    digest = released.write(Network(released.config()), tmp_path)
    assert len(digest) == 64
    from nanoserve.checkpoint import open_checkpoint
    from nanoserve.weights import resolve

    manifest = resolve(open_checkpoint(tmp_path), released.config())
    assert manifest.skipped_mtp == 48
