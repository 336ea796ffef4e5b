"""What must stay as it is, written down: `golden(name, value)` compares a value with tests/golden/<name>.

After a change that is meant, write the files anew and read the difference in git:

    GLMCHAT_WRITE_GOLDENS=1 pytest tests/golden
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WRITING = os.environ.get("GLMCHAT_WRITE_GOLDENS") == "1"  # read before `own_home` clears the environment


class Golden:
    """The files of this folder. A text is compared as it is, anything else as JSON."""

    writing = WRITING

    def __call__(self, name: str, value: Any) -> None:
        if WRITING:
            self.write(name, value)
        if isinstance(value, str):
            assert value == (HERE / name).read_text(encoding="utf-8"), name
        else:
            assert json.loads(json.dumps(value)) == self.read(name), name

    def read(self, name: str) -> Any:
        return json.loads((HERE / name).read_text(encoding="utf-8"))

    def write(self, name: str, value: Any) -> None:
        text = (
            value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        )
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_text(text, encoding="utf-8")
