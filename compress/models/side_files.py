"""Names of the files that belong to a model beside its weights and config.json."""

from __future__ import annotations

from fnmatch import fnmatchcase

# Any one of these holds a vocabulary by itself.
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "spm.model", "tiktoken.model", "*.tiktoken",
)  # fmt: skip

# What a result gets as it is. Tokenizers name their sentencepiece models as they like.
COMPANIONS = (
    *VOCABULARIES, "*.model", "tokenizer*", "vocab*", "sentencepiece*", "merges.txt", "bpe.codes",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "codebook.safetensors", "LICENSE*",
    "NOTICE*",
)  # fmt: skip

# What is fetched with the weights: exact names where others of the kind may be large and foreign.
SIDE_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *VOCABULARIES,
    "merges.txt", "bpe.codes", "chat_template.jinja", "chat_template.json",
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md",
)  # fmt: skip


def is_side_file(name: str) -> bool:
    """Whether a file of a repository is one of ``SIDE_FILES``; those in folders below are not."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in SIDE_FILES)
