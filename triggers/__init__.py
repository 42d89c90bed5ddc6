"""What turns something that happens outside (a file, an object, a request, a due time) into an Event."""
