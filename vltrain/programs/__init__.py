"""What a user starts: each module is one program, `main(argv) -> exit code`. Above all other rooms."""
