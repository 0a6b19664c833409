"""The page that shows a host as it is now: in JupyterLab and in a terminal."""
