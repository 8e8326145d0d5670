"""Before any test: what must be said to Triton before anything imports it, and where the tools are that formats are held to.

Where there is no GPU its kernels run in its interpreter, and Triton's own library decides that as it is imported, which
transformers does too. The tools are in `.tools` once `make tools` has put them there; .venv goes before it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from paddock.planning.hardware import gpu_device_files_exist

if not gpu_device_files_exist():
    os.environ.setdefault("TRITON_INTERPRET", "1")
_TOOLS = Path(__file__).parent / ".tools"
if _TOOLS.is_dir() and str(_TOOLS) not in sys.path:
    sys.path.append(str(_TOOLS))
