"""The code's own order: which module may import which, what is documented, how long a module is, and who prints."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import farcast_cli
from farcast_cli.trainers import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pytest

PACKAGE = Path(farcast_cli.__file__).parent
MAX_LINES = 600

ORDER = (
    "__init__",
    "system",
    "errors",
    "optional",
    "choices",
    "progress",
    "tensors",
    "evaluation.__init__",
    "evaluation.command",
    "evaluation.judge",
    "evaluation.hook",
    "files.__init__",
    "files.reading",
    "files.json_text",
    "files.renames",
    "files.hidden",
    "files.staged",
    "files.place",
    "remote.__init__",
    "remote.spans",
    "remote.store",
    "remote.mirror",
    "remote.upload",
    "formats.__init__",
    "formats.safetensors_file",
    "formats.tree",
    "formats.pickle_names",
    "formats.pickle_scan",
    "formats.unpacked",
    "formats.torch_pickle",
    "formats.pickle_file",
    "formats.pickled_module",
    "formats.zip_file",
    "formats.file_kind",
    "formats.torch_file",
    "formats.torch_bundle",
    "formats.copied_file",
    "formats.torch_zip",
    "formats.dcp_file",
    "trainers.formulas",
    "trainers.falls",
    "trainers.torch_schedules",
    "trainers.schedules",
    "trainers.names",
    "trainers.folder_files",
    "trainers.base",
    "trainers.by_content",
    "trainers.group_marks",
    "trainers.weights_folder",
    "trainers.run_end",
    "trainers.kept",
    "trainers.loose_safetensors",
    "trainers.networks",
    "trainers.averages",
    "trainers.torch_payload",
    "trainers.side_files",
    "trainers.dcp_parts",
    "trainers.fsdp",
    "trainers.deepspeed",
    "trainers.dcp",
    "trainers.refused",
    "trainers.hub_folder",
    "trainers.transformers_rates",
    "trainers.hf_trainer",
    "trainers.accelerate",
    "trainers.torch_folder",
    "trainers.lightning_loops",
    "trainers.lightning",
    "trainers.composer",
    "trainers.stable_baselines3",
    "trainers.foreign",
    "trainers.__init__",
    "run.__init__",
    "run.closed",
    "run.mixed",
    "run.trust",
    "run.epochs",
    "run.steps",
    "run.nothing",
    "run.entries",
    "run.intervals",
    "run.trajectory",
    "run.kept",
    "run.losses",
    "run.quantised",
    "run.alignment",
    "run.thinning",
    "run.selection",
    "run.pace",
    "answer",
    "records",
    "results",
    "state.__init__",
    "state.counters",
    "state.files",
    "state.pickled",
    "state.places",
    "state.trained",
    "state.advance",
    "state.metadata",
    "state.rates",
    "checkpoint.__init__",
    "checkpoint.pieces",
    "checkpoint.torch_output",
    "checkpoint.bundle_output",
    "checkpoint.contents",
    "checkpoint.dcp_output",
    "checkpoint.hub",
    "checkpoint.plan",
    "checkpoint.convert",
    "engine.__init__",
    "engine.casts",
    "engine.native",
    "engine.reader",
    "engine.workers",
    "engine.linear",
    "engine.ranges",
    "engine.room",
    "engine.ranks",
    "engine.output_files",
    "engine.checksums",
    "engine.arithmetic",
    "engine.device",
    "engine.batch",
    "engine.worker",
    "engine.write",
    "agreement",
    "forecast.__init__",
    "forecast.device_gram",
    "forecast.products",
    "forecast.gram",
    "forecast.accumulate",
    "forecast.timeline",
    "forecast.lfd2",
    "forecast.forecaster",
    "forecast.methods",
    "forecast.momentum",
    "forecast.steering",
    "forecast.significance",
    "forecast.words",
    "forecast.backtest",
    "forecast.choice",
    "forecast.ledger",
    "forecast.state_ledger",
    "forecast.worth",
    "forecast.history",
    "forecast.forecaster_file",
    "forecast.judgement",
    "forecast.fitting",
    "forecast.memory",
    "second_copies",
    "keeping",
    "folder",
    "verification",
    "request",
    "headline",
    "planning",
    "sidecar",
    "card",
    "repeat",
    "publish",
    "prediction",
    "advice",
    "leaps.__init__",
    "leaps.ask",
    "leaps.evidence",
    "leaps.decision",
    "leaps.call",
    "reports.__init__",
    "reports.story",
    "reports.panels",
    "reports.text",
    "reports.figures",
    "reports.svg",
    "reports.page",
    "reports.output",
    "watching",
    "tune.__init__",
    "tune.numbers",
    "tune.gate",
    "tune.objective",
    "tune.weight",
    "tune.rows_file",
    "tune.data",
    "tune.metric",
    "tune.delta",
    "tune.ridge",
    "tune.layers",
    "tune.adapter",
    "tune.request",
    "tune.record",
    "tune.solve",
    "tune.description",
    "tune.write",
    "tune.run",
    "answers",
    "log_to",
    "horizons",
    "settings",
    "live.__init__",
    "live.processes",
    "live.weights",
    "live.loss",
    "live.leaps",
    "loop",
    "hf",
    "lightning",
    "texts",
    "returned",
    "api",
    "commands.__init__",
    "commands.tables",
    "commands.progress_line",
    "commands.cautions",
    "commands.grouped",
    "commands.render",
    "commands.view",
    "commands.streams",
    "commands.mistakes",
    "commands.options",
    "commands.inspect",
    "commands.keep",
    "commands.fit",
    "commands.backtest",
    "commands.predict",
    "commands.report",
    "commands.verify",
    "commands.leap",
    "commands.watch",
    "commands.tune",
    "commands.schema",
    "commands.help",
    "commands.ci",
    "cli",
    "__main__",
)
"""Each module imports only what stands before it."""

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE / "scripts"  # which are printed, and never imported
)


def source_of(module: str) -> str:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(source_of(module))


def module_named(dotted: str) -> str | None:
    """The module of the package that a full dotted name stands for; None where it is none."""
    name = dotted.removeprefix("farcast_cli").lstrip(".")
    for candidate in (name, f"{name}.__init__".lstrip(".")):
        if candidate in MODULES:
            return candidate
    return None


def imports_of(module: str) -> set[str]:
    """Every module of the package that a module imports, in functions and for types too."""
    found: set[str | None] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "farcast_cli"]
            found |= {module_named(name) for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "farcast_cli":
            found |= {module_named(f"{node.module}.{alias.name}") or module_named(node.module or "") for alias in node.names}
    return {name for name in found if name is not None}


def wrong(check: Callable[[str], object], modules: Iterable[str] = MODULES) -> dict[str, object]:
    """What a check finds, by module: every module that fails is named. A check that finds nothing returns what is empty."""
    return {module: found for module in modules if (found := check(module))}


def test_every_module_has_a_place_in_the_order() -> None:
    assert sorted(ORDER) == MODULES


def test_a_module_imports_only_modules_before_it() -> None:
    """The package itself, which comes first, only names where its public names are: it imports none of them by itself."""
    assert wrong(lambda module: imports_of(module) - set(ORDER[: ORDER.index(module)])) == {
        "__init__": {"api", "errors", "returned"}
    }


def lines_of_unclear_imports(module: str) -> list[int]:
    froms = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ImportFrom)]
    return [node.lineno for node in froms if node.level or any(alias.name == "*" for alias in node.names)]


def test_imports_within_the_package_are_spelled_out() -> None:
    assert wrong(lines_of_unclear_imports) == {}


def undocumented(module: str) -> list[str]:
    """The module itself, or its public classes."""
    tree = tree_of(module)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    nothing = [] if ast.get_docstring(tree) else ["the module"]
    return nothing + [node.name for node in classes if not ast.get_docstring(node)]


def test_a_module_and_its_public_classes_say_what_they_are() -> None:
    assert wrong(undocumented) == {}


def test_a_module_is_one_noun_long() -> None:
    lengths = {module: len(source_of(module).splitlines()) for module in MODULES}
    assert {module: length for module, length in lengths.items() if length > MAX_LINES} == {}


def lines_that_print(module: str) -> list[str]:
    """Calls of `print`, and statements that touch this process's streams."""
    lines = source_of(module).splitlines()
    found = []
    for node in ast.walk(tree_of(module)):
        prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        streams = (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in {("sys", "stdout"), ("sys", "stderr")}
        )
        if isinstance(node, ast.expr) and (prints or streams):  # for a stream, the line says what is done with it
            found.append(lines[node.lineno - 1].strip())
    return found


def test_no_module_but_render_prints() -> None:
    others = [module for module in MODULES if module not in {"commands.render", "cli", "commands.streams", "__main__"}]
    assert wrong(lines_that_print, others) == {}
    for_render = {name: {"rich"} for name in ("commands.tables", "commands.progress_line", "commands.view")}
    assert wrong(lambda module: packages_of(module) & {"rich"}, others) == for_render


def packages_of(module: str) -> set[str]:
    """The names of all packages that a module imports from anywhere."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_the_command_line_itself_writes_only_its_version_its_help_and_that_it_was_interrupted() -> None:
    written = [line for line in lines_that_print("cli") if "print(" in line or ".write(" in line]
    assert [line for line in written if "sys.stdout" in line and not ("__version__" in line or "get_help()" in line)] == []
    assert [line for line in written if "sys.stdout" not in line and 'sys.stderr.write("interrupted' not in line] == []


COMMANDS = (
    "inspect",
    "keep",
    "watch",
    "fit",
    "backtest",
    "report",
    "predict",
    "verify",
    "leap",
    "tune",
    "schema",
    "help",
    "ci",
)
MAX_STATEMENTS = 20


def test_a_command_is_short_and_has_a_module_of_its_own() -> None:
    for command in COMMANDS:
        functions = [node for node in tree_of(f"commands.{command}").body if isinstance(node, ast.FunctionDef)]
        (body,) = [node.body for node in functions if node.name == command]
        assert sum(isinstance(node, ast.stmt) for part in body for node in ast.walk(part)) <= MAX_STATEMENTS, command
    assert [node for node in ast.walk(tree_of("cli")) if isinstance(node, ast.FunctionDef) and node.name in COMMANDS] == []


UNREAD = {"inspect": {"quiet"}, "tune": {"verbose"}}
"""Options that all commands share, where one has nothing to leave out or to add."""


def test_every_option_of_a_command_is_read_in_its_body() -> None:
    for command in COMMANDS:
        functions = [node for node in tree_of(f"commands.{command}").body if isinstance(node, ast.FunctionDef)]
        (function,) = [node for node in functions if node.name == command]
        options = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
        read = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
        assert options - read == {"config"} & options | UNREAD.get(command, set()), command  # its callback reads the file


HEAVY = {"torch", "numpy", "transformers", "huggingface_hub"}


def heavy_imports_at_its_top(module: str) -> set[str]:
    top = [node for node in tree_of(module).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name for node in top for name in ([alias.name for alias in node.names] + [getattr(node, "module", None) or ""])}
    return {name for name in names if name.split(".")[0] in HEAVY}


def test_what_inspect_needs_imports_torch_nowhere_at_its_top() -> None:
    needed = [
        "run.mixed",
        "run.steps",
        "run.entries",
        "run.trajectory",
        "run.losses",
        *(module for module in MODULES if module.startswith(("files.", "formats.", "trainers."))),
    ]
    assert wrong(heavy_imports_at_its_top, needed) == {}


ONE_TRAINERS = {"hf", "lightning"}  # callbacks that run inside it
OF_SOME_SYSTEMS = {"ctypes", "fcntl", "grp", "msvcrt", "pwd", "resource", "termios", "winreg"}
EVERYWHERE = {
    "O_RDONLY",
    "O_WRONLY",
    "O_RDWR",
    "O_APPEND",
    "O_CREAT",
    "O_EXCL",
    "O_TRUNC",
    "SIGINT",
    "SIGTERM",
    "SIG_IGN",
    "SIG_DFL",
}
ASKED_IN_SYSTEM = {
    "os": {
        *("chmod", "chown", "fchmod", "fork", "fsync", "geteuid", "getuid", "killpg", "link", "name", "open", "posix_fadvise"),
        *("posix_fallocate", "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity", "setsid", "statvfs", "sync", "uname"),
    },
    "sys": {"platform", "getwindowsversion"},
    "mmap": {"MADV_DONTNEED", "MAP_SHARED", "PAGESIZE", "PROT_READ", "PROT_WRITE"},
    "signal": {"SIGHUP", "SIGKILL", "SIGQUIT", "SIGBREAK", "alarm", "setitimer"},
}


def asked_of_the_system(module: str) -> list[str]:
    """What only some systems have, or have in another way: modules, names of modules, /proc, and descriptors of folders."""
    found = sorted(packages_of(module) & OF_SOME_SYSTEMS)
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ASKED_IN_SYSTEM:
            of_some = node.attr.startswith(("O_", "SIG")) and node.attr not in EVERYWHERE
            if of_some or node.attr in ASKED_IN_SYSTEM[node.value.id]:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module in ASKED_IN_SYSTEM:
            found += [f"from {node.module} import {alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/proc"):
            found.append(node.value)
        elif isinstance(node, ast.keyword) and node.arg is not None and node.arg.endswith("dir_fd"):
            found.append(node.arg)
    return found


def test_only_one_module_asks_what_differs_between_systems() -> None:
    assert wrong(asked_of_the_system, [module for module in MODULES if module != "system"]) == {}
    assert {"ctypes", "os.open", "sys.platform", "signal.SIGKILL", "/proc", "dir_fd"} <= set(asked_of_the_system("system"))


CONTAINERS = {"safetensors", "dcp"}  # of the output as well as layouts
LAYOUT_NAMES = {layout.name for layout in LAYOUTS} - CONTAINERS
KNOWN_OUTSIDE = {
    "trainers.__init__",
    "trainers.base",
    "trainers.foreign",
    "trainers.kept",
    "trainers.names",
    "trainers.schedules",
    "trainers.torch_schedules",
}


def test_what_is_known_of_a_trainer_stays_in_its_layout() -> None:
    outside = [module for module in MODULES if not module.startswith("trainers.") and module not in ONE_TRAINERS]
    assert wrong(lambda module: {n for n in imports_of(module) if n.startswith("trainers.")} - KNOWN_OUTSIDE, outside) == {}
    assert wrong(compared_layouts, outside) == {}


def compared_layouts(module: str) -> list[str]:
    """Comparisons of a name or a layout with that of a certain one."""
    lines = source_of(module).splitlines()
    found = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {each.value for side in sides for each in ast.walk(side) if isinstance(each, ast.Constant)}
            if (
                any(isinstance(side, ast.Attribute) and side.attr in {"layout", "name"} for side in sides)
                and names & LAYOUT_NAMES
            ):
                found.append(lines[node.lineno - 1].strip())
    return found


def test_a_comparison_with_a_layouts_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'if origin.layout == "lightning" or kind.name in {"composer"} or kind.name == "dcp":\n    pass'
    monkeypatch.setitem(globals(), "source_of", lambda _: text)
    monkeypatch.setitem(globals(), "tree_of", lambda _: ast.parse(text))
    assert len(compared_layouts("any")) == 2


def public_types(module: str) -> set[str]:
    """Its public classes and the types that it names by assignment."""
    classes = {node.name for node in tree_of(module).body if isinstance(node, ast.ClassDef)}
    assigned = [target for node in tree_of(module).body if isinstance(node, ast.Assign) for target in node.targets]
    aliases = {target.id for target in assigned if isinstance(target, ast.Name) and not target.id.isupper()}
    return {name for name in classes | aliases if name[:1].isupper()}


SHARED = {"LeapCallback": ["hf", "lightning"]}
"""Public names that two trainers' users import, each from their own module."""


def test_no_two_public_types_share_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for module in MODULES:
        for name in public_types(module):
            homes.setdefault(name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == SHARED


def folder_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_no_folder_imports_a_folder_above_it() -> None:
    floors = list(dict.fromkeys(folder_of(module) for module in ORDER))
    assert [folder_of(module) for module in ORDER] == [f for f in floors for module in ORDER if folder_of(module) == f]
