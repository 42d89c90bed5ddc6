"""The worker: a Celery worker whose one task carries steps (step.py), and what its parent process watches."""
