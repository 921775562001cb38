"""The plan of the house as a table: who may import whom, and which library is used where."""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

# Rooms from the ground floor up: the modules in each (a package stands for all in it), and the
# rooms below that they may import. Within a room modules may import each other, not in a circle.
GROUND = "ground floor"
PROGRAMS = [
    *("train", "train_loop", "train_progress", "train_pictures"),
    *("train_autoencoder", "autoencoder_results"),
    *("sample", "edit", "draw", "prepare_images", "prepare_captions"),
    *("evaluate", "evaluation_inputs", "evaluation_rows", "evaluation_sweep"),
    *("evaluate_documents", "document_scores", "generated_documents", "evaluation_captions"),
    *("reference_stats", "train_evaluation"),
    *("sampling_flags", "text_flags", "generation_request", "generation_prompts"),
    *("caption", "caption_outputs"),
    *("sample_outputs", "sample_places", "sample_recipe", "sample_working_folder"),
    *("encode", "encode_verify"),
    *("preflight", "preflight_report", "preflight_mends", "preflight_text"),
]
ROOMS = {
    GROUND: (
        [
            *("errors", "rng", "sharding", "factorization", "clean_lengths", "diffusion"),
            *("documents", "document_masks"),
            *("paths", "checkpoint_folders", "checkpoint_retention", "checkpoint_metadata"),
            *("preemption", "processes", "tensor_files"),
        ],
        [],
    ),
    "models": (["models", "flops"], [GROUND]),
    "compiler": (["tpu_topology", "collectives", "compiled_report"], [GROUND, "models"]),
    "objective": (
        ["objective", "document_objective", "autoencoder_objective"],
        [GROUND, "models"],
    ),
    "optimizer": (["optimizer"], [GROUND]),
    "sampling": (
        [
            *("sampling", "guided_network", "denoising", "denoising_tables", "guidance"),
            *("plans", "editing", "text_sampling", "document_sampling", "beam_search"),
            "class_evidence",
        ],
        [GROUND, "models"],
    ),
    "autoencoder files": (
        [
            *("autoencoder_files", "lpips_files", "inception_files"),
            *("mesh_autoencoder", "latent_encoder"),
        ],
        [GROUND, "models"],
    ),
    "storage": (["train_state", "checkpoints", "checkpoint_weights"], [GROUND]),
    "metric log": (["metric_log", "metric_files"], [GROUND]),
    "data": (["data"], [GROUND]),
    "evaluation": (["evaluation"], [GROUND, "models", "data", "autoencoder files"]),
    "pictures": (["visualization"], [GROUND]),
    "config": (["config_loading", "program"], [GROUND]),
    "train step": (
        ["train_step", "autoencoder_train_step"],
        [GROUND, "models", "objective", "storage"],
    ),
    "build": (
        ["build", "build_data", "build_documents"],
        [
            *(GROUND, "models", "objective", "optimizer", "sampling", "storage", "train step"),
            *("data", "autoencoder files"),
        ],
    ),
    "sampler": (
        ["sampler", "document_sampler", "document_parts", "document_stream", "model_loading"],
        [
            *(GROUND, "models", "sampling", "storage", "data", "config", "build"),
            "autoencoder files",
        ],
    ),
    "package": ([""], ["sampler"]),
    "convert": (
        ["convert"],  # its program too
        [
            *(GROUND, "models", "optimizer", "autoencoder files", "storage", "config", "build"),
            "package",
        ],
    ),
    "programs": (
        PROGRAMS,
        [
            *(GROUND, "models", "objective", "optimizer", "sampling", "storage", "train step"),
            *("metric log", "compiler", "autoencoder files"),
            *("data", "evaluation", "pictures", "config", "build", "sampler", "package"),
        ],
    ),
}

# Modules that may import a library; None for all.
LIBRARIES = {
    "numpy": None,
    "jax": None,
    "absl": None,
    "tqdm": None,
    "flax": [
        *("sharding", "train_state", "models", "autoencoder_files", "lpips_files"),
        *("inception_files", "convert", "evaluation", "document_sampling"),
    ],
    "optax": [
        *("optimizer", "train_state", "train_step", "autoencoder_train_step"),
        *("build", "evaluation", *PROGRAMS),
    ],
    "etils": [
        *("paths", "checkpoint_folders", "checkpoint_retention", "checkpoint_metadata"),
        *("checkpoints", "checkpoint_weights", "metric_log", "metric_files"),
    ],
    "orbax": ["checkpoints", "checkpoint_weights", "processes"],
    "ml_collections": [
        *("config_loading", "build", "build_data", "build_documents", "sampler", "model_loading"),
        *("convert.__main__", "convert.new_run"),
        *PROGRAMS,
    ],
    "tensorboardX": ["metric_log", "metric_files"],
    "grain": ["data"],
    "array_record": ["data"],
    "ml_dtypes": ["data.latents"],
    "tensorflow_datasets": ["data.tfds_images", "data.tfds_captions"],
    "tokenizers": ["data.tokenizers"],
    "sentencepiece": ["data.tokenizers"],
    "PIL": ["data", "visualization"],
    "clu": PROGRAMS,
    "matplotlib": ["visualization"],
    "torch": ["convert"],
}
# Of libraries that may be used everywhere, these exceptions: plain data has no devices or flags.
NOT_IN = {
    "jax": [
        *("errors", "paths", "checkpoint_folders", "checkpoint_retention"),
        *("diffusion.schedule", "documents"),
    ],
    "absl": [
        *("errors", "rng", "factorization", "diffusion", "documents", "document_masks"),
        *("models", "objective", "document_objective", "sampling"),
    ],
}


def module_name(path):
    parts = path.relative_to(REPOSITORY / "cfjax").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


TREES = {
    module_name(path): ast.parse(path.read_text())
    for path in sorted((REPOSITORY / "cfjax").rglob("*.py"))
}


def imports(tree):
    """Dotted names of all that a module imports, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(tree):
    """The modules of cfjax among them: `cfjax.a.b` may be module a.b, or name b of module a."""
    found = set()
    for name in imports(tree):
        package, *parts = name.split(".")
        if package == "cfjax":
            longest = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
            found.add(next(module for module in longest if module in TREES))
    return found


def is_within(module, entries):
    return any(module == entry or (entry and module.startswith(f"{entry}.")) for entry in entries)


def room_of(module):
    rooms = [room for room, (entries, _) in ROOMS.items() if is_within(module, entries)]
    assert len(rooms) == 1, f"cfjax.{module} is in {rooms or 'no room'} of the table"
    return rooms[0]


def test_table_is_a_house():
    """Rooms use only rooms below them, and every entry stands for a module that exists."""
    above = set(ROOMS)
    for room, (entries, uses) in reversed(ROOMS.items()):
        above.remove(room)
        assert set(uses) <= above, f"{room} uses a room that is not below it"
        for entry in entries:
            assert entry in TREES, f"cfjax.{entry} is gone"


@pytest.mark.parametrize("module", TREES)
def test_imports_point_downwards(module):
    room = room_of(module)
    for imported in own_imports(TREES[module]):
        there = room_of(imported)
        assert there == room or there in ROOMS[room][1], (
            f"cfjax.{module} ({room}) imports cfjax.{imported} ({there})"
        )


def test_no_circles():
    below = {module: own_imports(tree) - {module} for module, tree in TREES.items()}
    while below:
        free = {module for module, needs in below.items() if not needs & below.keys()}
        assert free, f"a circle of imports among {sorted(below)}"
        below = {module: needs for module, needs in below.items() if module not in free}


@pytest.mark.parametrize("module", TREES)
def test_libraries_stay_in_their_rooms(module):
    libraries = {name.split(".")[0] for name in imports(TREES[module])}
    for library in libraries - {"cfjax"} - sys.stdlib_module_names:
        assert library in LIBRARIES, f"cfjax.{module} imports {library}, which is not in the table"
        allowed = LIBRARIES[library]
        assert allowed is None or is_within(module, allowed), f"cfjax.{module} imports {library}"
        assert not is_within(module, NOT_IN.get(library, [])), f"cfjax.{module} imports {library}"


@pytest.mark.parametrize("module", TREES)
def test_no_left_overs(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "breakpoint"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("jax.debug", "pdb.set_trace"), f"line {node.lineno}"
    assert not {"jax.debug", "pdb"} & imports(TREES[module])
