"""Fool networks by hand, in the browser: a trial on one picture -> cards -> the page's server."""
