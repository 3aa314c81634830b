"""Who may send requests, and how many: keys, limits of keys, and requests of web pages."""
