"""The preflight of a site's data: everything is looked at here, and nothing of it leaves."""
