"""How good the multi-token-prediction block is: ``python -m nanoserve.models.demo.agreement [MODEL]``.

MODEL is a demo checkpoint of any precision (default: the shipped one). On conversations, told as they are, the
block's first choice for the token after the next is held against the model's own first choice there.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanoserve.checkpoint import SINGLE
from nanoserve.files import DEMO_MODEL
from nanoserve.models.demo import progress_set, released
from nanoserve.models.demo.corpus import Document
from nanoserve.models.demo.network import Network
from nanoserve.models.demo.original import expanded

_KINDS = ("arithmetic", "tools", "json", "talk", "earlier")


def network_of(directory: Path) -> Network:
    """A demo checkpoint as the network that was trained, with the values that its formats hold."""
    stored = load_file(directory / SINGLE)
    network = Network(released.config())
    for name, tensor in released.named(network).items():
        tensor.copy_(expanded(stored, name).view_as(tensor))
    network.hold(exact=True)
    return network


@torch.no_grad()
def agreement(network: Network, one: Document) -> tuple[int, int]:
    """(tokens where both choose the same, tokens compared) among those that the assistant writes."""
    length, chunk = len(one.ids), network.c.chunk_size
    ids = torch.zeros(1, -(-length // chunk) * chunk, dtype=torch.long)
    ids[0, :length] = torch.from_numpy(one.ids)
    logits, drafted = network(ids, torch.arange(ids.shape[1]).unsqueeze(0))
    chosen, draft = logits[0].argmax(dim=-1), drafted[0].argmax(dim=-1)
    written = torch.from_numpy(one.weights[2:] == 1)
    same = draft[: length - 2] == chosen[1 : length - 1]
    return int((same & written).sum()), int(written.sum())


def measure(directory: Path, count: int) -> Iterator[str]:
    """A line for each kind of conversation, the last for all."""
    network = network_of(directory)
    total = [0, 0]
    documents = progress_set.documents(directory, dict.fromkeys(_KINDS, count))
    for name in _KINDS:
        pairs = [agreement(network, one) for kind, one in documents if kind == name]
        same, compared = (sum(column) for column in zip(*pairs, strict=True))
        total = [total[0] + same, total[1] + compared]
        yield f"{name:<12} {same / compared:7.2%} of {compared:,} tokens"
    yield f"{'all':<12} {total[0] / total[1]:7.2%} of {total[1]:,} tokens"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m nanoserve.models.demo.agreement", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO_MODEL, metavar="MODEL")
    parser.add_argument("--count", type=int, default=100, help="conversations of each kind")
    options = parser.parse_args()
    for line in measure(options.model, options.count):
        print(line, flush=True)


if __name__ == "__main__":
    main()
