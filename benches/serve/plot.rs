//! SVG plots: lines over a logarithmic axis, and bars.

use std::fmt::Write;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 80.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;
const RIGHT: f64 = 20.0;
const COLOURS: [&str; 4] = ["#1b6ca8", "#c8553d", "#588157", "#7a5195"];

/// Points that are joined by a line. All x values are above zero.
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// A bar, labelled with the value.
pub struct Bar {
    pub name: String,
    pub value: f64,
}

/// Draws a plot of lines. The y axis begins at 0, and the x axis is logarithmic to base 2.
pub fn lines(title: &str, x_title: &str, lines: &[Line]) -> String {
    let all = || lines.iter().flat_map(|l| &l.points);
    let x_end = all().map(|p| p.0.log2()).fold(1.0, f64::max);
    let (y_end, y_step) = scale(all().map(|p| p.1).fold(0.0, f64::max));
    let x = |v: f64| LEFT + v.log2() / x_end * (WIDTH - LEFT - RIGHT);
    let y = |v: f64| HEIGHT - BOTTOM - v / y_end * (HEIGHT - TOP - BOTTOM);
    let mut svg = begin(title, HEIGHT);
    let mut tick = 0.0;
    while tick <= y_end {
        let at = y(tick);
        let _ =
            writeln!(svg, r##"<line x1="{LEFT}" x2="{}" y1="{at:.1}" y2="{at:.1}" stroke="#ddd"/>"##, WIDTH - RIGHT);
        let _ =
            writeln!(svg, r#"<text x="{}" y="{:.1}" text-anchor="end">{}</text>"#, LEFT - 8.0, at + 4.0, number(tick));
        tick += y_step;
    }
    let mut power = 0.0;
    while power <= x_end {
        let at = x(power.exp2());
        let _ = writeln!(
            svg,
            r#"<text x="{at:.1}" y="{}" text-anchor="middle">{}</text>"#,
            HEIGHT - BOTTOM + 18.0,
            power.exp2()
        );
        power += 1.0;
    }
    let middle = f64::midpoint(LEFT, WIDTH - RIGHT);
    let _ = writeln!(svg, r#"<text x="{middle}" y="{}" text-anchor="middle">{x_title}</text>"#, HEIGHT - 22.0);
    for (i, line) in lines.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let points: Vec<String> = line.points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let _ = writeln!(
            svg,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
            points.join(" ")
        );
        for p in &line.points {
            let _ = writeln!(svg, r#"<circle cx="{:.1}" cy="{:.1}" r="3.5" fill="{colour}"/>"#, x(p.0), y(p.1));
        }
        let at = LEFT + i as f64 * 210.0;
        let _ = writeln!(svg, r#"<rect x="{at}" y="{}" width="12" height="12" fill="{colour}"/>"#, HEIGHT - 14.0);
        let _ = writeln!(svg, r#"<text x="{}" y="{}">{}</text>"#, at + 18.0, HEIGHT - 4.0, escape(&line.name));
    }
    svg + "</svg>\n"
}

/// Draws a plot of horizontal bars, one below another.
pub fn bars(title: &str, bars: &[Bar]) -> String {
    const ROW: f64 = 26.0;
    const NAMES: f64 = 190.0;
    const VALUES: f64 = 80.0;
    let end = bars.iter().map(|b| b.value).fold(f64::MIN_POSITIVE, f64::max);
    let mut svg = begin(title, TOP + ROW * bars.len() as f64 + 10.0);
    for (i, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * i as f64;
        let width = bar.value / end * (WIDTH - NAMES - VALUES);
        let colour = COLOURS[usize::from(!bar.name.starts_with("diffdiskd"))];
        let name = escape(&bar.name);
        let _ = writeln!(svg, r#"<text x="{}" y="{}" text-anchor="end">{name}</text>"#, NAMES - 8.0, y + 15.0);
        let _ = writeln!(svg, r#"<rect x="{NAMES}" y="{y}" width="{width:.1}" height="20" fill="{colour}"/>"#);
        let _ = writeln!(svg, r#"<text x="{:.1}" y="{}">{}</text>"#, NAMES + width + 6.0, y + 15.0, number(bar.value));
    }
    svg + "</svg>\n"
}

fn begin(title: &str, height: f64) -> String {
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">"#
    );
    let _ = writeln!(svg, r#"<rect width="100%" height="100%" fill="white"/>"#);
    let _ = writeln!(
        svg,
        r#"<text x="{}" y="26" text-anchor="middle" font-size="15">{}</text>"#,
        WIDTH / 2.0,
        escape(title)
    );
    svg
}

/// Returns the end of an axis, a round number at or above `most`, and a step that divides the axis into at most eight
/// parts.
fn scale(most: f64) -> (f64, f64) {
    let most = most.max(f64::MIN_POSITIVE);
    let power = 10f64.powf(most.log10().floor());
    let step = [0.2, 0.25, 0.5, 1.0, 2.0].map(|s| s * power).into_iter().find(|s| most / s <= 8.0).unwrap_or(power);
    ((most / step).ceil() * step, step)
}

fn number(value: f64) -> String {
    if value >= 10_000.0 {
        format!("{:.0}k", value / 1000.0)
    } else if value >= 100.0 || value == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
