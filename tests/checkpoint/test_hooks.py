"""Importing the package costs nothing and touches nothing until a checkpoint of ours is opened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout.strip()


def test_hooks_import_nothing_heavy():
    code = (
        "import sys; from compress.checkpoint.hooks import install_hooks; install_hooks(); "
        "print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    )
    assert run(code) == "[]"


INSTALL = "from compress.checkpoint.hooks import install_hooks; install_hooks(); "


def test_own_types_are_known_and_no_block_class_is_touched():
    check = (
        "import sys; from transformers import AutoConfig, BertConfig; "
        "own = AutoConfig.for_model('compress_bert', hidden_size=48); "
        "assert isinstance(own, BertConfig) and own.hidden_size == 48; "
        "BertConfig(per_layer_config={0: {'intermediate_size': 8}}); "
        "print(own.model_type, 'compress.checkpoint.per_layer' in sys.modules)"
    )
    assert run(INSTALL + check) == "compress_bert False"


def test_own_types_are_known_where_transformers_was_first(forked_python):
    first = "from transformers.models.auto.configuration_auto import CONFIG_MAPPING as known; "
    check = "print('compress_bert' in known)"
    code = first + "assert 'compress_bert' not in known; " + INSTALL + check
    done = forked_python("-c", code, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr
