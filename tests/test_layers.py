"""The two rules of the architecture: imports point down the list, and each library has its door."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megaseg_dask"

# From the bottom up. A module may import those before it; a new module gets its place here.
LAYERS = """
errors events narration
geometry blending intensity thresholds labelling digits measurements layout memory simulation evaluate
stores.threads stores.addresses stores.options stores.failures stores.environment stores.clients stores.folders
stores.disks stores.objects stores.foreign stores.location stores.downloads stores
models.network models.recipes models.bundle models.guards models.files models.statements models.heads
models.preprocessing models.cytodl models.copies models models.cards models.cache models.download models.zoo
engines engines.pytorch engines.openvino inference
ngff ngff.pyramids ngff.images ngff.volumes ngff.plates ngff.tables ngff.consolidated
parsing settings clusterfile plan parts planning journal runlog lease products
tasks.scores tasks.labels tasks.levels tasks.objects tasks.whole tasks
publishing targets tables
cluster.config cluster.gpus cluster.kinds cluster.versions cluster.joining cluster dispatch flows pace run single
xarrays
training.inside training.environment training.manifest training.card training.process training.session training
scoring
report.views report.survey report.seams report.pictures report.charts report.commands report.page report
view.scenes view.states view.server view
demo checkup doctor checking
console exits options_cli jobs_cli looking_cli models_cli training_cli cluster_cli cli
__init__ __main__
""".split()

# library: the modules (or packages) through which it comes in.
DOORS = {
    "cc3d": {"labelling"},
    "cyto_dl": {"training.inside"},
    "dask": {"cluster", "xarrays"},
    "dask_jobqueue": {"cluster"},
    "dask_kubernetes": {"cluster"},
    "distributed": {"cluster", "dispatch"},
    "PIL": {"report"},
    "fsspec": {"stores"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "monai": {"models", "engines"},
    "lightning": {"training.inside"},
    "numpy": None,
    "obstore": {"stores"},
    "omegaconf": {"training.inside"},
    "ome_zarr_models": {"ngff"},
    "openvino": {"engines"},
    "psutil": {"memory", "planning", "doctor"},
    "pyarrow": {"ngff"},
    "pydantic": {"settings", "clusterfile", "plan", "ngff"},
    "rich": {"console"},
    "matplotlib": {"demo", "training"},
    "skimage": {"thresholds"},
    "scipy": {"labelling", "simulation", "evaluate"},
    "tifffile": {"demo", "training"},
    "torch": {"models", "engines"},
    "neuroglancer": {"view"},
    "tornado": {"view"},
    "typer": {
        "cli",
        "cluster_cli",
        "console",
        "exits",
        "jobs_cli",
        "looking_cli",
        "models_cli",
        "options_cli",
        "training_cli",
    },
    "xarray": {"xarrays"},
    "yaml": {"models", "clusterfile"},
    "zarr": {"ngff", "stores"},
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else str(node.module) for name in names}
    return found


def is_module(name: str) -> bool:
    return name.removeprefix("megaseg_dask.") in MODULES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_has_its_place(module):
    assert module in LAYERS, f"{module} has no place in LAYERS"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    own = [name.removeprefix("megaseg_dask.") for name in imports(MODULES[module]) if name.startswith("megaseg_dask.")]
    above = [name for name in own if LAYERS.index(name) >= LAYERS.index(module)]
    assert not above, f"{module} imports {above}, which stand above it"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_library_has_its_door(module):
    for name in imports(MODULES[module]):
        library = name.split(".")[0]
        if library == "megaseg_dask" or library in sys.stdlib_module_names:
            continue
        assert library in DOORS, f"{module} imports {library}, which has no door"
        doors = DOORS[library]
        assert doors is None or {module, module.split(".")[0]} & doors, f"{library} comes in through {doors}"


def test_every_declared_dependency_is_used():
    import tomllib

    names = {
        "connected-components-3d": "cc3d",
        "pillow": "PIL",
        "pyyaml": "yaml",
        "ome-zarr-models": "ome_zarr_models",
        "scikit-image": "skimage",
    }
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = {line.split(">")[0].split("=")[0].strip() for line in project["dependencies"]}
    used = {name.split(".")[0] for path in MODULES.values() for name in imports(path)}
    assert {names.get(name, name) for name in declared} <= used


def test_files_can_be_read_in_one_sitting():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert max(lengths.values()) <= 400, {name: n for name, n in lengths.items() if n > 400}
