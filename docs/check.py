"""The work of check.sh; see there. Standard library only."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_SECONDS = 120
GENERATED = {"reference": "docs/guide/pipeline-reference.md", "schema": "docs/pipeline.schema.json"}
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
COMMENT = re.compile(r"^<!-- *(exit|file|deadline|needs): *(\S+) *-->$")
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")

passed, failed, skipped = 0, 0, 0


def tell(ok, what, detail=""):
    global passed, failed
    passed, failed = passed + ok, failed + (not ok)
    print(f"{'ok  ' if ok else 'FAIL'}  {what}", flush=True)
    if detail:
        print("      " + detail.rstrip().replace("\n", "\n      "), flush=True)


def blocks(path):
    """Fenced blocks: (line, info, notes, text). A fence that is not closed is a mistake."""
    notes, fence, out, body = {}, None, [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = FENCE.match(line)
        if fence:
            if match and match[2].startswith(fence[1]) and not match[3].strip():
                out.append((fence[0], fence[2], notes, "\n".join(body) + "\n"))
                notes, fence, body = {}, None, []
            else:
                body.append(line[fence[3]:] if line[: fence[3]].isspace() else line)
        elif match:
            fence = (number, match[2], match[3].strip(), len(match[1]))
        elif note := COMMENT.match(line.strip()):
            notes[note[1]] = note[2]
        elif line.strip():
            notes = {}
    if fence:
        tell(False, f"{path.relative_to(ROOT)}:{fence[0]}", "the block is not closed")
    return out


def run_block(text, directory, environment, deadline):
    """Runs it with bash in a process group of its own; nothing of the group outlives the block."""
    log = tempfile.TemporaryFile()
    child = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", text], cwd=directory, env=environment,
        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = child.wait(deadline)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
    log.seek(0)
    return code, log.read().decode("utf-8", "replace")


def find_python(environment):
    return shutil.which("python3", path=environment["PATH"]) or sys.executable


def check_commands(path, binary):
    global skipped
    found = blocks(path)
    if not any(info == "sh" or "file" in notes for _, info, notes, _ in found):
        return
    with tempfile.TemporaryDirectory(prefix="emberline-docs-") as scratch:
        directory = Path(scratch) / "work"
        shutil.copytree(ROOT / "examples", directory / "examples", ignore=shutil.ignore_patterns(".emberline", ".venv"))
        programs = Path(scratch) / "bin"
        programs.mkdir()
        (programs / "emberline").symlink_to(binary)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("EMBERLINE_")}
        environment["PATH"] = f"{programs}:{environment['PATH']}"
        for line, info, notes, text in found:
            place = f"{path.relative_to(ROOT)}:{line}"
            if "file" in notes:
                target = directory / notes["file"]
                if not target.resolve().is_relative_to(directory.resolve()):
                    tell(False, place, f"`{notes['file']}` is outside of the scratch directory")
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
                continue
            if info != "sh":
                continue
            module = notes.get("needs")
            if module and subprocess.run([find_python(environment), "-c", f"import {module}"], capture_output=True).returncode:
                skipped += 1
                print(f"skip  {place}  python3 has no module `{module}`", flush=True)
                continue
            expected = int(notes.get("exit", 0))
            deadline = int(notes.get("deadline", DEADLINE_SECONDS))
            began = time.monotonic()
            code, output = run_block(text, directory, environment, deadline)
            took = time.monotonic() - began
            first = text.strip().splitlines()[0] if text.strip() else "(empty)"
            if code == expected:
                tell(True, f"{place}  {took:.1f}s  {first}")
            elif code is None:
                tell(False, f"{place}  {first}", f"was not done after {deadline} s\n{output[-2000:]}")
            else:
                tell(False, f"{place}  {first}", f"exit code {code}, not {expected}\n{output[-2000:]}")


def check_generated(binary):
    for command, name in GENERATED.items():
        made = subprocess.run([binary, command], capture_output=True, timeout=60)
        path = ROOT / name
        same = made.returncode == 0 and path.is_file() and path.read_bytes() == made.stdout
        tell(same, f"{name} is generated", "" if same else f"it differs: emberline {command} > {name}")


def markdown_files():
    skip = {"target", ".git", ".emberline", "node_modules", ".venv"}
    for directory, names, files in os.walk(ROOT):
        names[:] = sorted(n for n in names if n not in skip)
        yield from (Path(directory) / f for f in sorted(files) if f.endswith(".md"))


def headings(path):
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    anchors = set()
    for title in re.findall(r"^#{1,6} +(.*)$", text, flags=re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        number, base = 0, anchor
        while anchor in anchors:
            number += 1
            anchor = f"{base}-{number}"
        anchors.add(anchor)
    return anchors


def check_links():
    count, broken = 0, []
    for path in markdown_files():
        text = re.sub(r"^(`{3,}|~{3,}).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
            if re.match(r"^[a-z][a-z0-9+.-]*:", link):
                continue
            count += 1
            name, _, anchor = link.partition("#")
            target = path if not name else (path.parent / name)
            if not target.exists():
                broken.append(f"{path.relative_to(ROOT)}: {link}")
            elif anchor and target.suffix == ".md" and anchor not in headings(target):
                broken.append(f"{path.relative_to(ROOT)}: {link} (no such heading)")
    tell(not broken, f"{count} relative links", "\n".join(broken))


def main():
    binary = Path(sys.argv[1]).resolve()
    named = [Path(name).resolve() for name in sys.argv[2:]]
    if not named:
        check_generated(binary)
        check_links()
    guides = [ROOT / "README.md", *sorted(ROOT.glob("docs/guide/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
    for path in named or guides:
        if path.is_file():
            check_commands(path, binary)
        elif named:
            tell(False, str(path), "there is no such file")
    print(f"{passed} ok, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


sys.exit(main())
