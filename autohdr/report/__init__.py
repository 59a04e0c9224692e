"""What `evaluate` found, made readable: a table for a terminal, and a page of HTML with the pictures."""

from autohdr.report.page import SHOWN_PAIRS, encode_pictures, write_page
from autohdr.report.tables import format_table

__all__ = ["SHOWN_PAIRS", "encode_pictures", "format_table", "write_page"]
