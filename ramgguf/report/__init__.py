"""Results for people: terminal tables, markdown, CSV, JSON and one HTML page."""
