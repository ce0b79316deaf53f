"""Tables, figures and pages of finished runs. Reads the store only."""

from ibxai.report.leaderboard import write_leaderboard
from ibxai.report.page import write_report
from ibxai.report.repairs import finish_runs, remove_damaged

__all__ = ["finish_runs", "remove_damaged", "write_leaderboard", "write_report"]
