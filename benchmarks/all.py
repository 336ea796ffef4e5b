"""`make bench`: every benchmark that fits an evening's machine, one after the other, with the command above each.

Peers are installed by benchmarks/install_peers.sh; without them their part is left out and said so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".test-cache" / "peers-venv"


def run(*arguments: str) -> None:
    """Show the command, run it, and go on whatever it says: a failure is a result too."""
    print("\n$ " + " ".join(arguments), flush=True)
    done = subprocess.run([sys.executable, "-P", *arguments[1:]], cwd=ROOT, check=False)
    if done.returncode:
        print(f"(ended with code {done.returncode})", flush=True)


def main() -> None:
    run("python", "benchmarks/start_up.py")
    if PEERS.is_dir():
        run("python", "benchmarks/starter_peers.py")
    else:
        print(f"no peers at {PEERS}: benchmarks/install_peers.sh installs them", flush=True)
    run("python", "benchmarks/kernels.py")
    run("python", "benchmarks/quantise_speed.py")
    run("python", "benchmarks/long_context.py")
    run("python", "benchmarks/window_stream.py")
    run("python", "benchmarks/chat_history.py")
    run("python", "benchmarks/kill_chat.py", "--kills", "10")
    run("python", "benchmarks/pull_throughput.py")


if __name__ == "__main__":
    main()
