"""What commands print is whole, wherever it goes."""

from __future__ import annotations

import os
import subprocess
import sys

PRINT_A_WIDE_TABLE = """
from rich.table import Table
from runtime.console import stdout
table = Table(*(f"column {i}" for i in range(12)))
table.add_row(*("98.8 % of 500" for _ in range(12)))
stdout.print(table)
"""


def test_a_wide_table_in_a_file_has_its_numbers() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", PRINT_A_WIDE_TABLE]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert printed.count("98.8 % of 500") == 12
