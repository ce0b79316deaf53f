"""Tables, figures and pages of finished runs. Reads the store only."""

from ibxai.report.leaderboard import write_leaderboard
from ibxai.report.page import write_report

__all__ = ["write_leaderboard", "write_report"]
