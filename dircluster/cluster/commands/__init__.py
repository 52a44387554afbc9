"""One call behind each job."""
