"""Before any test: what must be said to Triton before anything imports it.

Where there is no GPU its kernels run in its interpreter, and Triton's own library decides that as it is imported, which
transformers does too.
"""

from __future__ import annotations

import os

from paddock.planning.hardware import gpu_device_files_exist

if not gpu_device_files_exist():
    os.environ.setdefault("TRITON_INTERPRET", "1")
