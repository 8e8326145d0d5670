"""Which names are public: frozen here, and all that a plugin of ours imports, in its tests too."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.policy.source_tree import DISTRIBUTIONS, ROOT

PUBLIC = {
    "paddock": """
        LLM CheckpointError CompletionOutput EngineConfig KernelError Logprob ModelConfigError OptionError PaddockError PlanError
        PluginError QualityError QueueFullError RequestError RequestOutput SamplingParams Timings __version__""",
    "paddock.assemble": "assemble plan",
    "paddock.axes": """
        EMBED FFN FP8_GROUP FP8_STATIC FP8_TOKEN HEADS INPUT_FORMATS KV_HEADS PLAIN VOCAB WHOLE
        Embedding KeepsScales Linear Module Part RoundsInputs Scheme Shard Tensor TensorAxis Unquantized Vector WeightTable
        left_plain""",
    "paddock.checkpoint.load": "load",
    "paddock.errors": """
        CheckpointError KernelError ModelConfigError OptionError PaddockError PlanError PluginError QualityError QueueFullError
        RequestError did_you_mean""",
    "paddock.evaluation": """
        ChoiceResult Comparison Documents Perplexity Question TASKS Task choices compare fetch perplexity read_documents""",
    "paddock.execution.randomness": "drawn_seed gumbel mix64 noise_bits seed_words token_terms",
    "paddock.execution.sampling_ops": "Draw DrawFiltered REFERENCE_OPS SAMPLING_OP_NAMES SamplingOps",
    "paddock.execution.sampling_reference": "draw draw_filtered most_likely",
    "paddock.layers": """
        Activation AttentionBackend AttentionInputs AttentionParams Builder Communicator FusesSiluMul HEADS_APART LayerKV
        LinearLayer LinearMethod Model OP_NAMES Ops PlainMethod QuantisesRows QuantizedActivation TWO_DELTAS TakesFewPlain
        TakesGroups allocate finalise part_spans randomise takes targets torch_dtype""",
    "paddock.layers.fp8_attention": "LARGEST_EXPONENT attend_in_fp8",
    "paddock.layers.int4": """
        BLOCK FP8_MAX Int4Form Int4Weight MIDDLE MOST OUTPUTS PIECE_BYTES SLAB SLAB_BYTES fill_groups int4_weight pack
        pack_zeros pieces unpack unpack_zeros""",
    "paddock.layers.reference": """
        FP8 FP8_MAX FP8_MIN_SCALE add_layer_norm add_rms_norm cache_kv embed fp8_scale gelu gelu_fp8 int4_to_fp8
        layer_norm layer_norm_fp8 linear linear_fp8 linear_fp8_blocks linear_fp8_fast linear_int4 linear_int4_fp8
        linear_silu_mul_fp8 linear_silu_mul_fp8_fast quantize_fp8_static quantize_fp8_token rms_norm rms_norm_fp8
        rope_and_cache silu_mul silu_mul_fp8""",
    "paddock.model_config": """
        BOOKKEEPING ConfigReader MAX_LAYERS MAX_POSITIONS MAX_SIZE ROPE_KINDS RopeSpec eos_token_ids parse_rope""",
    "paddock.module_lists": """
        HEAD_CLASSES LINEAR_CLASSES PATTERN check_compressed compressed_rank compressed_targets in_compressed in_modelopt""",
    "paddock.plugins": """
        AttentionNeeds AttentionSpec CheckpointFacts CommandSpec Issue ModelSpec ObserverSpec OpSpec ParallelSpec QuantizationSpec
        RecipeSpec hookimpl resolve""",
    "paddock.plugins.host": "PluginHost",
    "paddock.quantize.options": "DEFAULT_LENGTH DEFAULT_SAMPLES DEFAULT_TEXT MAX_SHARD_BYTES QuantizeOptions parse_gate",
    "paddock.quantize.recipe": "LayerWork PlainLayer PlainLinear PlainVector Recipe RecipeInputs",
    "paddock.quantize.run": "quantize",
    "paddock.testing.contracts": """
        BuiltModel MODEL_BOUND build_model check_batching check_chunking check_model check_parameters check_pipeline
        check_tensor_parallel check_wanted checkpoint load""",
    "paddock.testing.fakes": "FakeInFlight FakeModel FakeRunner",
    "paddock.testing.kernels": """
        AttentionCase BATCHES Comparison HEADS attention_case check_attention check_cache_op check_op comparisons page_comparisons
        widened""",
    "paddock.testing.oracle": """
        ODD_SIZES ROUNDINGS UNIT_ROUNDOFF assert_close bound dense_attention poisoned relative_rms""",
    "paddock.testing.paging": "Chunk Pages step",
    "paddock.testing.ranks": "ThreadCommunicator run_ranks",
    "paddock.testing.text": "SPECIAL ScriptedEngine byte_fallback_tokenizer byte_level_tokenizer",
}
PLUGINS = [folder for folder in DISTRIBUTIONS if folder.parent.name == "plugins"]


@pytest.mark.parametrize("module", PUBLIC)
def test_the_names_of_a_public_module_are_frozen(module: str) -> None:
    """A name added or removed is a decision, made here too, and each name loads."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None) or list(_defined(Path(str(loaded.__file__))))
    assert sorted(names) == sorted(PUBLIC[module].split())
    assert all(hasattr(loaded, name) for name in names)


def test_every_module_for_tests_is_public() -> None:
    """All of `paddock.testing` is for plugin authors, so all of it is frozen."""
    modules = {f"paddock.testing.{path.stem}" for path in (ROOT / "core/src/paddock/testing").glob("[!_]*.py")}
    assert modules == {module for module in PUBLIC if module.startswith("paddock.testing.")}


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_a_plugin_imports_public_names_and_its_own_alone(folder: Path) -> None:
    """What our plugins can do, anybody's can; and their tests run where only the core and they are installed."""
    strangers = [
        f"{path.relative_to(ROOT)} imports {name} of {module}"
        for path in sorted(folder.rglob("*.py"))
        for module, name in _imported(path)
        if module.split(".")[0] in ("paddock", "core", "tests", "plugins")
        and not module.startswith(f"plugins.{folder.name}.tests.")
        and f"{module}.{name}" not in PUBLIC
        and (module, name) != ("paddock", "paddock")
        and name not in PUBLIC.get(module, "").split()
    ]
    assert not strangers


def test_plugin_authors_are_told_which_modules_are_public() -> None:
    """The page about plugins has a row for every public module, and for no other."""
    page = (ROOT / "docs/plugins.md").read_text()
    table = page.split("## What you may import\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(paddock[\w.]*)`", table, re.MULTILINE)) == sorted(PUBLIC)


def _defined(path: Path) -> Iterator[str]:
    """Yield the names a module without `__all__` defines itself, those with an underscore left out."""
    for node in ast.parse(path.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_") and len(name) > 1)


def _imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every import of a file; `import a.b` is (a, b)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module, _, name = alias.name.rpartition(".")
                yield module or name, name
