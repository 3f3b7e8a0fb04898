"""The file formats of others, bytes to arrays and back; nothing about models."""
