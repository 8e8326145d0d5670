"""Which checkpoints of NVIDIA's ModelOpt are read: those with FP8 weights, or with FP8 KV alone. Free of torch.

The quantisation is described in config.json (exporters from about version 0.30 on), in hf_quant_config.json (all of them), or in
both, which must then agree.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from paddock.axes import FP8_STATIC, FP8_TOKEN, PLAIN
from paddock.errors import ModelConfigError
from paddock.model_config import ConfigReader
from paddock.plugins import CheckpointFacts
from paddock_quant_fp8.reading import Entry, entry_of, names_in, reader_of
from paddock_quant_fp8.schemes import BLOCK, ROW, TENSOR, ModelOptFp8, ModelOptKv, Stored

FILE = "hf_quant_config.json"
ALGORITHMS = {
    "FP8": Stored(scales=TENSOR, input_format=FP8_STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": Stored(scales=ROW, input_format=FP8_TOKEN),
    "FP8_PB_WO": Stored(scales=BLOCK, input_format=PLAIN),
}
_NO_ALGORITHM = ("", "NO_QUANT")  # null, missing, and TensorRT-LLM's word for it: weights are plain
_KV_KEYS = ("kv_cache_quant_algo", "kv_cache_scheme")
_LISTS = ("exclude_modules", "ignore")
_FP8_KV = {"dynamic": False, "num_bits": 8, "type": "float"}


_Sections = Mapping[str, tuple[ConfigReader, Entry]]


@frozen
class _Said:
    """What a file says: the algorithm, `fp8` or nothing for KV, and the modules left plain, in order of name.

    `lists` says whether it has a list of them, though it be empty.
    """

    algorithm: str
    kv: str | None
    skipped: tuple[str, ...]
    lists: bool = field(eq=False)

    def __str__(self) -> str:
        """Return it as the error for two files that disagree quotes it."""
        return (
            f"quant_algo {self.algorithm or 'none'}, KV {self.kv or 'plain'}, plain modules {', '.join(self.skipped) or 'none'}"
        )


def detect(facts: CheckpointFacts) -> ModelOptFp8 | None:
    """Return the scheme of a ModelOpt checkpoint in FP8, else None: its other algorithms are left to other formats.

    A list of plain modules without the head means that the head is quantised; without any list it is plain, as the tool leaves it
    unasked. Raises ModelConfigError for unknown keys, a KV cache in other than FP8, and two files that disagree.
    """
    said = _described(facts)
    if not said or _common_algorithm(said) not in ALGORITHMS:
        return None
    read = _agreed(said)
    return ModelOptFp8(
        dtype=facts.dtype,
        how=ALGORITHMS[read[0].algorithm],
        skipped=read[0].skipped,
        quantises_head=any(one.lists for one in read),
        kv_cache_dtype=read[0].kv,
    )


def detect_kv(facts: CheckpointFacts) -> ModelOptKv | None:
    """Return the scheme of a ModelOpt checkpoint with FP8 keys and values and plain weights, else None.

    Its `quant_algo` is null, missing or `NO_QUANT`, and it has no groups of quantised modules. Raises ModelConfigError for
    unknown keys, a KV cache in other than FP8, and two files that disagree.
    """
    said = _described(facts)
    entries = [entry for _, entry in said.values()]
    if not any(entry.get(key) is not None for entry in entries for key in _KV_KEYS) or _common_algorithm(said):
        return None
    if any(entry.get("config_groups") for entry in entries):
        return None
    return ModelOptKv(dtype=facts.dtype, kv_cache_dtype=_agreed(said)[0].kv)


def _described(facts: CheckpointFacts) -> _Sections:
    """Return what config.json and the file beside it say of a ModelOpt checkpoint, by file name; nothing of any other."""
    if isinstance(facts.config.get("compression_config"), Mapping):
        return {}
    found = entry_of(facts, lambda method: method.startswith("modelopt"))
    if found is None and facts.config.get("quantization_config"):
        return {}
    return {name: one for name, one in (("config.json", found), (FILE, _in_file(facts))) if one is not None}


def _common_algorithm(said: _Sections) -> str:
    """Return the algorithm all files name, empty for none; raise ModelConfigError where they name different ones."""
    algorithms = {name: _algorithm(entry) for name, (_, entry) in said.items()}
    if len(set(algorithms.values())) > 1:
        raise _two_stories(
            {name: f"quant_algo {algorithm}" if algorithm else "no quant_algo" for name, algorithm in algorithms.items()}
        )
    return next(iter(algorithms.values()), "")


def _agreed(said: _Sections) -> list[_Said]:
    """Return what each file says; raise ModelConfigError unless all say the same."""
    read = {name: _read(name, *one) for name, one in said.items()}
    first, *others = read.values()
    if any(other != first for other in others):
        raise _two_stories(read)
    return [first, *others]


def _in_file(facts: CheckpointFacts) -> tuple[ConfigReader, Entry] | None:
    """Return the quantisation section of hf_quant_config.json with a reader of it, None where there is none."""
    section = facts.files.get(FILE, {}).get("quantization")
    if not isinstance(section, Mapping) or not section:
        return None
    return reader_of(facts, "quantization", section, file=FILE), section


def _algorithm(entry: Entry) -> str:
    found = str(entry.get("quant_algo") or "").upper()
    return "" if found in _NO_ALGORITHM else found


def _two_stories(said: Mapping[str, object]) -> ModelConfigError:
    return ModelConfigError(
        "; ".join(f"{name} says {one}" for name, one in said.items()),
        fix="the two must describe the same quantisation: keep the files of one export",
    )


def _read(name: str, reader: ConfigReader, entry: Entry) -> _Said:
    """Return what one file says, in either of the two forms."""
    reader.accept("quant_algo", "producer", "config_groups", "group_size", *_KV_KEYS)
    skipped = names_in(reader, entry, *_LISTS)
    kv = _kv(reader, entry)
    reader.finish()
    lists = any(entry.get(key) is not None for key in _LISTS)
    return _Said(_algorithm(entry), kv, tuple(sorted(set(skipped))), lists)


def _kv(reader: ConfigReader, entry: Entry) -> str | None:
    for key in _KV_KEYS:
        said = entry.get(key)
        if isinstance(said, Mapping) and {name: said.get(name, value) for name, value in _FP8_KV.items()} == _FP8_KV:
            return "fp8"
        if said is not None and str(said).upper() != "FP8":
            raise reader.wrong(key, said, "FP8 or null: keys and values are kept in FP8 or plainly")
        if said is not None:
            return "fp8"
    return None
