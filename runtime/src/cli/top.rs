//! `mindseye top`: every node on the network, until it is told to stop. It is drawn with plain cursor sequences: works over
//! ssh.

use super::run::configure;
use super::{say, stop_flag};
use crate::top::{Fleet, Line, Style, screen};
use anyhow::Context;
use clap::Args;
use crossterm::event::{Event, KeyCode, KeyEventKind};
use crossterm::style::{Attribute, Color, Print, SetAttribute, SetForegroundColor};
use crossterm::terminal::{Clear, ClearType};
use crossterm::{cursor, queue, terminal};
use mindseye_bridge::clock;
use mindseye_bridge::ros::RosSession;
use serde_json::Value;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Args)]
#[command(after_help = "Examples:\n  mindseye top\n  mindseye top --connect tcp/router.local:7447\n  \
                        mindseye top --once --json")]
pub struct TopArgs {
    /// Seconds between two looks.
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    every: f64,
    /// Look twice, print that and end: for scripts.
    #[arg(long)]
    once: bool,
    /// With --once: the status documents as one JSON document.
    #[arg(long, requires = "once")]
    json: bool,
    /// Robot configuration: where the network is.
    #[arg(long, value_name = "TOML")]
    config: Option<PathBuf>,
    /// Endpoint to connect to instead of the configuration's; may be repeated.
    #[arg(long, value_name = "ENDPOINT")]
    connect: Vec<String>,
}

/// Nodes that are busy answer a question within this.
const ANSWER_WITHIN: Duration = Duration::from_millis(800);
/// Lines of what is not a terminal.
const PLAIN: (usize, usize) = (160, 400);

pub fn run(args: &TopArgs) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        args.every.is_finite() && args.every > 0.0,
        "--every must be a number of seconds above 0"
    );
    let mut config = configure(args.config.as_ref(), &args.connect, &[])?;
    // A looker-on needs no port of its own and must not take the robot's.
    config.ros.zenoh.listen = Some(vec![]);
    config.ros.node = "mindseye_top".into();
    let session = RosSession::open(&config.ros).context("cannot open the Zenoh session")?;
    let every = Duration::from_secs_f64(args.every);
    if args.once {
        return once(args, &session, every);
    }
    anyhow::ensure!(std::io::stdout().is_terminal(), "this is no terminal: use --once");
    let stop = stop_flag()?;
    let _terminal = Terminal::enter()?;
    let mut fleet = Fleet::default();
    while !stop.load(Ordering::Relaxed) {
        let next = Instant::now() + every;
        look(&session, &mut fleet)?;
        draw(&fleet, &session)?;
        if !wait(next, &stop, &mut fleet, &session)? {
            break;
        }
    }
    // Everything was seen; a session that does not close cleanly changes nothing about it.
    let _ = session.close();
    Ok(ExitCode::SUCCESS)
}

/// Asks everybody, once.
fn look(session: &RosSession, fleet: &mut Fleet) -> anyhow::Result<Vec<Value>> {
    let documents: Vec<Value> = session
        .query_all_json("mindseye/*/status", ANSWER_WITHIN)?
        .iter()
        .filter_map(|text| serde_json::from_str(text).ok())
        .collect();
    let mut alive = session.claimants("mindseye/*/node", ANSWER_WITHIN)?;
    for (name, _) in &mut alive {
        *name = name.split('/').nth(1).unwrap_or_default().to_owned();
    }
    fleet.take(clock::monotonic(), &alive, documents.clone());
    Ok(documents)
}

fn link(session: &RosSession) -> String {
    match session.links() {
        0 => "nobody is reached".into(),
        1 => "1 link".into(),
        n => format!("{n} links"),
    }
}

fn once(args: &TopArgs, session: &RosSession, every: Duration) -> anyhow::Result<ExitCode> {
    let mut fleet = Fleet::default();
    // Rates need two looks.
    look(session, &mut fleet)?;
    std::thread::sleep(every);
    let documents = look(session, &mut fleet)?;
    if args.json {
        say(&serde_json::json!({"nodes": fleet.len(), "statuses": documents}).to_string())?;
    } else {
        for line in screen(&fleet, clock::monotonic(), PLAIN, &link(session)) {
            say(&line.text)?;
        }
    }
    let _ = session.close();
    Ok(if fleet.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Hears keys until the next look; false: to end.
fn wait(next: Instant, stop: &AtomicBool, fleet: &mut Fleet, session: &RosSession) -> anyhow::Result<bool> {
    while !stop.load(Ordering::Relaxed) {
        let left = next.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(true);
        }
        if !crossterm::event::poll(left.min(Duration::from_millis(100)))? {
            continue;
        }
        match crossterm::event::read()? {
            Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                KeyCode::Char('q') | KeyCode::Esc => return Ok(false),
                // In raw mode Ctrl-C is a key.
                KeyCode::Char('c') if key.modifiers.contains(crossterm::event::KeyModifiers::CONTROL) => {
                    return Ok(false);
                }
                KeyCode::Up | KeyCode::Char('k') => fleet.choose(false),
                KeyCode::Down | KeyCode::Char('j') => fleet.choose(true),
                _ => continue,
            },
            Event::Resize(..) => {}
            _ => continue,
        }
        draw(fleet, session)?;
    }
    Ok(false)
}

fn draw(fleet: &Fleet, session: &RosSession) -> anyhow::Result<()> {
    let (width, height) = terminal::size()?;
    let lines = screen(fleet, clock::monotonic(), (width.into(), height.into()), &link(session));
    let mut out = std::io::stdout().lock();
    for (row, Line { style, text }) in (0..height).zip(&lines) {
        queue!(
            out,
            cursor::MoveTo(0, row),
            SetAttribute(Attribute::Reset),
            SetForegroundColor(Color::Reset)
        )?;
        match style {
            Style::Plain => {}
            Style::Head => queue!(out, SetAttribute(Attribute::Bold))?,
            Style::Chosen => queue!(out, SetAttribute(Attribute::Reverse))?,
            Style::Busy => queue!(out, SetForegroundColor(Color::Green))?,
            Style::Bad => queue!(out, SetForegroundColor(Color::Red))?,
            Style::Soft => queue!(out, SetAttribute(Attribute::Dim))?,
        }
        queue!(out, Print(text), SetAttribute(Attribute::Reset), Clear(ClearType::UntilNewLine))?;
    }
    // Each line was cleared to its end: nothing flickers.
    if lines.len() < height.into() {
        queue!(out, cursor::MoveTo(0, lines.len() as u16), Clear(ClearType::FromCursorDown))?;
    }
    out.flush().context("terminal")
}

/// The terminal as the screen needs it; as it was before when dropped.
struct Terminal;

impl Terminal {
    fn enter() -> anyhow::Result<Self> {
        terminal::enable_raw_mode().context("terminal")?;
        let entered = Self;
        crossterm::execute!(std::io::stdout(), terminal::EnterAlternateScreen, cursor::Hide)
            .context("terminal")?;
        Ok(entered)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nothing is left to be done where this fails.
        let _ = crossterm::execute!(std::io::stdout(), cursor::Show, terminal::LeaveAlternateScreen);
        let _ = terminal::disable_raw_mode();
    }
}
