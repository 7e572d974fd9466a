"""A matrix of configurations of one model, each sparsified, measured and written down: `optimum-cli nm report`.

matrix (which rows) → runner (each once, resumably) → measure (one row, a process of its own) → document and plots.
"""

from .matrix import Matrix, Row, default_matrix, read_matrix
from .runner import Report, Setting, run_report

__all__ = ["Matrix", "Report", "Row", "Setting", "default_matrix", "read_matrix", "run_report"]
