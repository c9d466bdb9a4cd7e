"""How the sample model `fasa-tiny` was trained; see README.md."""
