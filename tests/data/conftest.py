"""What the tests of data share: a tokenizer that begins every text with a token of its own."""

import shutil
from pathlib import Path

import peers
import pytest
from tokenizers import processors


@pytest.fixture(scope="session")
def with_bos(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with Llama's post-processor: the begin token goes in front of every text."""
    folder = tmp_path_factory.mktemp("with-bos")
    peer = peers.tiny_tokenizer()
    peer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    peer.bos_token = "<|endoftext|>"
    peer.save_pretrained(folder)
    shutil.copy(tiny / "config.json", folder)
    return folder
