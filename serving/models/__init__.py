"""The code behind the server's Python models; each version folder holds one line that imports its class from here."""
