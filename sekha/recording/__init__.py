"""What happened in a request, written into Prefect behind the answer, by another process."""
