"""README and docs: every command and code block runs in a finished tiny project."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.fork_server import forked_stages
from support.processes import free_port
from support.repository import Repository
from support.settings import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    # The commands of the research log change what every stage depends on: last.
    *sorted((ROOT / "docs").rglob("*.md"), key=lambda page: (page.stem == "research", page)),
    ROOT / "experiments" / "README.md",
    ROOT / "data" / "tables" / "README.md",
]
# Commands that test_documentation itself is part of, or that change the installation.
NOT_RUN = ("make test", "make test-fast", "make lint", "make format", "make lock")
# Commands that serve until they are stopped: the default port, and the option that changes it.
SERVERS = {
    "make ui": (5000, "PORT={port}"),
    "make dashboard": (8080, "DASHBOARD_PORT={port}"),
    "mlflow models serve": (5001, "--port {port}"),
}
# Blocks of plain text that hold commands: they need machines or files that a test does not have.
TEXT_COMMANDS = {
    "OPTUNA_STORAGE=postgresql": "tests/faults/test_killed_workers.py",
    "MLFLOW_TRACKING_URI=http": "tests/integration/test_outage.py",
    "torchrun": "tests/integration/test_ranks.py",
    "benchmarks.cohorts": "tests/benchmarks/cohorts/test_run.py",
    "benchmarks.settings": "tests/benchmarks/settings/test_settings.py",
}
# Commands that another test runs, and checks.
COVERED = {"dvc repro --single-item": "tests/integration/test_pipeline.py"}
# Stages that pages call; the fixture `finished` and tests/prediction/test_predict.py run processes.
STAGES = tuple(
    f"pipeline.{name}" for name in ("configure", "train", "tune", "results", "predict", "register")
)
# Larger budgets than a test needs.
SMALLER = {"TRIALS=40": "TRIALS=4", "TRIALS=12": "TRIALS=2", "WORKERS=8": "WORKERS=2"}


# Commands that one page runs for all: what starts so, and those that a page has run.
REPEATED = ("make", "dvc", "python -m pipeline")
PASSED: set[str] = set()


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    text = page.read_text()
    return [
        Block(page, text[: match.start()].count("\n") + 1, match[1], match[2])
        for match in fence.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUNNABLE = [page for page in PAGES if any(b.language in ("bash", "python") for b in blocks(page))]
# Their YAML and commands need the real cohorts: tests/integration/test_real_data.py runs them.
TUTORIALS = [page for page in RUNNABLE if page.parent.name == "tutorials"]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_has_a_language_that_a_test_runs(block):
    assert block.language in ("bash", "python", "yaml", "json", "text", "")
    commands = re.findall(r"^(?:\$ )?(?:make|dvc|python|export) .*", block.text, flags=re.MULTILINE)
    if block.language in ("", "text") and commands:
        covered = [test for words, test in TEXT_COMMANDS.items() if words in block.text]
        assert covered, f"{block}: mark commands as bash, so that they run"
        assert all((ROOT / test).exists() for test in covered)


def test_another_test_runs_the_commands_that_no_page_runs_here():
    for command, test in COVERED.items():
        assert set(command.split()) <= set(re.findall(r"[\w-]+", (ROOT / test).read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_or_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
            assert anchor in slugs, target


def test_the_readme_is_a_screen_and_a_half():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


def test_the_readme_names_every_room_and_page():
    readme = (ROOT / "README.md").read_text()
    rooms = [path.name for path in (ROOT / "pipeline/gem").iterdir() if path.is_dir()]
    for room in rooms:
        if not room.startswith("_"):
            assert re.search(rf"[├└] {room} ", readme), room
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT)) in readme, page


def test_the_readme_names_every_make_target_that_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for block in BLOCKS:
        if block.language == "bash":
            for target in re.findall(r"^make ([a-z-]+)", block.text, flags=re.MULTILINE):
                assert target in targets, f"{block}: make {target}"


@pytest.fixture(scope="module")
def project(finished, tmp_path_factory) -> Iterator[Path]:
    """A finished project. Its stages are forked: to import them takes most of their time."""
    folder = tmp_path_factory.mktemp("documentation") / "project"
    Repository.copy_of(finished, folder)
    environment = folder / ".venv"
    environment.unlink()
    with forked_stages(environment, *STAGES):
        (environment / "installed").touch()
        yield folder


def script(block: Block) -> str:
    """The block as a bash script: servers in the background, on a free port."""
    lines, port = ["set -eo pipefail"], free_port()
    text = block.text.replace("\\\n", " ")
    for words, smaller in SMALLER.items():
        text = text.replace(words, smaller)
    for line in text.splitlines():
        command = line.split(" #")[0].strip()
        if command in (*NOT_RUN, *PASSED) or command.startswith(("python -m pytest", *COVERED)):
            continue
        server = next((name for name in SERVERS if command.startswith(name)), None)
        if server:
            number, option = SERVERS[server]
            moved = command.replace(f" --port {number}", "") + " " + option.format(port=port)
            lines.append(f"({moved}) > server.log 2>&1 &")
            lines.append(
                f"for _ in $(seq 240); do curl -s -o /dev/null http://127.0.0.1:{port} && break; "
                "sleep 0.25; done"
            )
            lines.append(f"curl -s -o /dev/null http://127.0.0.1:{port} || (cat server.log; false)")
        else:
            lines.append(line.replace("127.0.0.1:5001", f"127.0.0.1:{port}"))
    return "\n".join(lines)


def run(block: Block, folder: Path) -> tuple[int, str]:
    """Exit code and output of a block."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "OPTUNA", "DVC"))
    }
    environment |= {"PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    if block.language == "python":
        command = [sys.executable, "-c", block.text]
    else:
        command = ["bash", "-c", script(block)]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output = process.communicate(timeout=600)[0]
        finally:
            # Servers that the block started share its session.
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
    commands = {line.split(" #")[0].strip() for line in block.text.splitlines()}
    PASSED.update(command for command in commands if command.startswith(REPEATED))
    return process.returncode, output


def prepare_inputs(page: Path, folder: Path) -> None:
    """Files that a page assumes its reader to have."""
    if page.name == "data.md":
        (folder / "counts.csv").write_text("sample,g1,g2\ns1,1,2\ns2,3,4\n")
        (folder / "samples.csv").write_text("sample,tissue\ns1,liver\ns2,lung\n")


def test_a_mistake_in_a_stage_fails_its_block(project):
    command = "python -m pipeline.predict --model absent --query query.csv --output out.parquet"
    code, output = run(Block(ROOT / "README.md", 1, "bash", f"{command}\ntouch next\n"), project)
    assert code == 2 and "error: " in output and not (project / "next").exists()


@pytest.mark.parametrize(
    "page",
    [page for page in RUNNABLE if page not in TUTORIALS],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_and_code_of_a_page_run_in_order(page, project):
    prepare_inputs(page, project)
    for block in blocks(page):
        if block.language in ("bash", "python"):
            code, output = run(block, project)
            assert code == 0, f"{block}\n{output[-3000:]}"
