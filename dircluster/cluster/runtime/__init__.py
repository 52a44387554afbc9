"""Ray: sessions, workers, and what passes between them and the terminal."""
