"""What a key or a token may be used for, and how its holder makes a weaker one. Knows no database and no HTTP."""
