"""HTML pages: the demo's report, a text being denoised, the scoreboard. HTML, CSS and JavaScript are in templates/."""
