"""Reading, placing and publishing files: every byte that comes in or goes out passes here."""
