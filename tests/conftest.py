"""What all tests share: settled randomness, few threads, and a tiny tokenizer and model."""

import os
from pathlib import Path

# Without a GPU kernels run on the CPU, interpreted. Triton reads this when it is first imported, which torch may do.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

from engine.config import ModelConfig
from engine.model import GPT
from engine.tokenizer import Tokenizer, train_tokenizer

settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    max_examples=30,
    # Fixtures here are frozen, or made anew from a seed: sharing them between examples is what is wanted.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("project")

DOCUMENTS = (
    "Once upon a time there was a little fox who lived in a wood. The fox was brave, and she had a friend.",
    '"Where is my hat?" asked the bear. "It is on your head," said the fox, and they both laughed.\n\nThe end.',
    "Tim wanted to build a boat.  He found a board, a nail and 12 ropes; then it rained for 34 days!",
    "Caf\u00e9, na\u00efve, \u00fcber: words with marks on them were the owl's favourites. She wrote them down.",
) * 4


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    torch.set_num_threads(2)
    # Processes that a test starts add up in the same order, and so to the same bit.
    os.environ["OMP_NUM_THREADS"] = "2"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def documents() -> tuple[str, ...]:
    return DOCUMENTS


@pytest.fixture(scope="session")
def tokenizer(documents: tuple[str, ...]) -> Tokenizer:
    return train_tokenizer(documents, 400)


@pytest.fixture(scope="session")
def small_config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(vocab_size=tokenizer.vocab_size, width=32, blocks=2, heads=2, context=48)


@pytest.fixture
def gpt(small_config: ModelConfig) -> GPT:
    """Untrained, but with weights so large that its choices are far apart and depend on the whole prompt."""
    torch.manual_seed(0)
    model = GPT(small_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model
