"""A cloud that is not there: its tools are replaced by stand-ins on PATH that record how they were called."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
CONFIG = "configs/quickstart.yaml"
TOOLS = ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "sky", "curl", "jaxalign", "nvidia-smi")

# Answers of a stand-in come from a file of rules, [pattern of the call, exit status, output]: the first rule whose
# pattern is found counts, and is used up, unless it is the last with this pattern. Without a rule: status 0, no output.
STAND_IN = r"""#!{python} -S
import json, os, re, sys
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
names = ("JAXALIGN_", "XLA_", "LIBTPU_", "CUDA_VISIBLE", "JAX_PLATFORMS", "GLIBC_")
record = {{"call": call, "env": {{k: v for k, v in os.environ.items() if k.startswith(names)}}}}
if call[0] == "kubectl" and call[-1] == "-":
    record["stdin"] = sys.stdin.read()
with open({calls!r}, "a") as file:
    file.write(json.dumps(record) + "\n")
rules = json.load(open({rules!r}))
text = " ".join(call)
for i, (pattern, status, output) in enumerate(rules):
    if re.search(pattern, text):
        if any(other[0] == pattern for other in rules[i + 1:]):
            del rules[i]
            json.dump(rules, open({rules!r}, "w"))
        sys.stdout.write(output)
        sys.exit(status)
"""


class Cloud:
    """Stand-ins for `TOOLS`, their rules, and what they were called with."""

    def __init__(self, folder: Path):
        self.bin, self.calls_file, self.rules = folder / "bin", folder / "calls.jsonl", folder / "rules.json"
        self.bin.mkdir()
        self.calls_file.touch()
        text = STAND_IN.format(python=sys.executable, calls=str(self.calls_file), rules=str(self.rules))
        for tool in TOOLS:
            self.write(tool, text)
        self.answer(("^curl", 22, ""))

    def write(self, tool: str, text: str) -> None:
        (self.bin / tool).write_text(text)
        (self.bin / tool).chmod(0o755)

    def answer(self, *rules: tuple[str, int, str]) -> None:
        self.rules.write_text(json.dumps(rules))

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen:
        other = ("JAXALIGN", "XLA", "JAX_", "SLURM", "LIBTPU", "CUDA_VISIBLE", "GLIBC_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(other)}
        return subprocess.Popen(
            [str(word) for word in command],
            # Nothing of the machine's own cloud tools can be reached but through the stand-ins before them.
            env={**kept, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": sys.executable, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )

    def run(self, *command: str | Path, **environment: str) -> tuple[int, str]:
        process = self.start(*command, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def calls(self, pattern: str = "") -> list[str]:
        texts = [" ".join(record["call"]) for record in self.records()]
        return [text for text in texts if re.search(pattern, text)]
