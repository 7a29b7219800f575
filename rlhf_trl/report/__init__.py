"""Results as a page: one self-contained HTML file and the same tables as text."""

from rlhf_trl.report.page import Code, Details, Figure, Gap, Page, Section, SideBySide, Table, Text, write_page

__all__ = ["Code", "Details", "Figure", "Gap", "Page", "Section", "SideBySide", "Table", "Text", "write_page"]
