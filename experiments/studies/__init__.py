"""One study per paper: its headline claim reproduced small, as a table (JSON) and a figure."""
