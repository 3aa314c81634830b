"""What several APIs need."""
