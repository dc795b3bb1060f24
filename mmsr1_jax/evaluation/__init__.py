"""Evaluation: ways to answer a question (`workflows`), what is on disk of each episode (`lines`),
figures (`figures`), pairs of them (`compare`), and the table of all (`table`)."""
