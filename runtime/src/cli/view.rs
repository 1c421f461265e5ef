//! `--view`: the live page beside `demo`, `run` and `replay`; `--report`: the same as a file, of `demo` and `replay`.

use crate::mind::Pipeline;
use crate::node::{Node, Observer};
use clap::Args;

#[cfg(feature = "view")]
pub use live::{Channels, Page, Report, ReportArgs, ViewArgs};
#[cfg(all(not(feature = "view"), feature = "demo"))]
pub use none::Channels;
#[cfg(not(feature = "view"))]
pub use none::{Page, Report, ReportArgs, ViewArgs};

/// Titled tables of a report.
pub type Facts = Vec<(String, Vec<(String, String)>)>;

/// Both hear everything.
pub fn both(a: Option<Observer>, b: Option<Observer>) -> Option<Observer> {
    match (a, b) {
        (Some(a), Some(b)) => Some(Box::new(move |event| {
            a(event);
            b(event);
        })),
        (a, b) => a.or(b),
    }
}

#[cfg(feature = "view")]
mod live {
    use super::*;
    use crate::context::GROUP;
    use crate::record::RecordSender;
    use crate::view::foxglove::{self, Foxglove, FoxgloveConfig};
    use crate::view::{
        About, DEFAULT_ADDRESS, ReportFacts, Reporter, Request, RequestError, View, ViewConfig, to_node,
    };
    use anyhow::Context;
    use mindseye_bridge::goal::Goal;
    use std::net::SocketAddr;
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::{Receiver, sync_channel};
    use std::time::Duration;

    /// Where the page is, and who may do what.
    #[derive(Args, Clone, Debug)]
    pub struct ViewArgs {
        /// Serve a live page for browsers: what the robot sees, remembers and imagines [default address:
        /// 127.0.0.1:8642]. On other addresses than loopback a token is needed, which is printed.
        #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = DEFAULT_ADDRESS)]
        view: Option<SocketAddr>,
        /// Let viewers ask and cancel on an address that is not loopback, too.
        #[arg(long, requires = "view")]
        view_control: bool,
        /// Serve the same to Foxglove, as its standard schemas [default address: 127.0.0.1:8765]. On other addresses
        /// than loopback a token is needed, which is printed.
        #[arg(long, value_name = "ADDR", num_args = 0..=1, default_missing_value = foxglove::DEFAULT_ADDRESS)]
        foxglove: Option<SocketAddr>,
    }

    impl ViewArgs {
        /// Begins to serve the page, where it is wanted; without a model there is nothing imagined to show.
        pub fn open(&self, robot: &str, pipeline: Option<&Pipeline>) -> anyhow::Result<Page> {
            let Some(address) = self.view else { return Ok(Page(None)) };
            let about = about(robot, pipeline);
            let decoder = pipeline.map(Pipeline::latent_decoder).transpose()?.flatten();
            let view = View::start(ViewConfig { address, control: self.view_control, about, decoder })?;
            eprintln!("mindseye: the page is at {}", view.url());
            Ok(Page(Some(view)))
        }

        /// Feeds Foxglove's channels, where they are looked at or recorded; `odom` is the frame of odometry.
        pub fn channels(&self, record: Option<RecordSender>, odom: &str) -> anyhow::Result<Channels> {
            if self.foxglove.is_none() && record.is_none() {
                return Ok(Channels(None));
            }
            let config = FoxgloveConfig { address: self.foxglove, record, odom_frame: odom.to_owned() };
            let channels = Foxglove::start(config)?;
            if let Some(url) = channels.url() {
                eprintln!("mindseye: Foxglove connects to {url}");
            }
            Ok(Channels(Some(channels)))
        }
    }

    /// Foxglove's channels, if there are any. To be dropped before a recording is finished.
    pub struct Channels(Option<Foxglove>);

    impl Channels {
        /// What a node is to be watched with.
        pub fn observer(&self) -> Option<Observer> {
            let tap = self.0.as_ref()?.tap();
            Some(Box::new(move |event| tap.hear(event)))
        }

        pub fn is_live(&self) -> bool {
            self.0.as_ref().is_some_and(|channels| channels.url().is_some())
        }
    }

    fn about(robot: &str, pipeline: Option<&Pipeline>) -> About {
        About {
            robot: robot.to_owned(),
            model: pipeline.map_or("a detector alone".into(), |p| p.bundle().manifest().name.clone()),
            words: pipeline.map_or_else(Vec::new, |p| p.words().to_vec()),
            boxed_frames: pipeline.map_or(0, |p| p.spec().box_latents * GROUP),
            width: pipeline.map_or(0, |p| p.spec().camera.width),
        }
    }

    /// Where the report goes.
    #[derive(Args, Clone, Debug)]
    pub struct ReportArgs {
        /// Write what was seen, imagined and answered as one HTML file that opens anywhere.
        #[arg(long, value_name = "HTML")]
        report: Option<PathBuf>,
    }

    impl ReportArgs {
        /// Begins to hear, where a report is wanted.
        pub fn open(&self, robot: &str, pipeline: Option<&Pipeline>) -> anyhow::Result<Report> {
            let Some(path) = &self.report else { return Ok(Report(None)) };
            let decoder = pipeline.map(Pipeline::latent_decoder).transpose()?.flatten();
            Ok(Report(Some((path.clone(), Arc::new(Reporter::new(&about(robot, pipeline), decoder))))))
        }
    }

    /// A report, if one is wanted.
    pub struct Report(Option<(PathBuf, Arc<Reporter>)>);

    impl Report {
        /// What a node is to be watched with.
        pub fn observer(&self) -> Option<Observer> {
            let reporter = self.0.as_ref()?.1.clone();
            Some(Box::new(move |event| reporter.hear(event)))
        }

        /// Writes it, whole or not at all; `tables` are asked for only where it is wanted. Gives its path.
        pub fn write(&self, tables: impl FnOnce() -> Facts) -> anyhow::Result<Option<PathBuf>> {
            let Some((path, reporter)) = &self.0 else { return Ok(None) };
            let command = super::super::facts::command(std::env::args_os());
            let html = reporter.html(&ReportFacts { command, tables: tables() });
            mindseye_base::file::replace(path, html.as_bytes())
                .with_context(|| path.display().to_string())?;
            Ok(Some(path.clone()))
        }
    }

    /// The page, if there is one.
    pub struct Page(Option<View>);

    impl Page {
        pub fn is_open(&self) -> bool {
            self.0.is_some()
        }

        /// What a node is to be watched with.
        pub fn observer(&self) -> Option<Observer> {
            let tap = self.0.as_ref()?.tap();
            Some(Box::new(move |event| tap.hear(event)))
        }

        /// Viewers ask this node.
        pub fn serve(&self, node: &Node) {
            if let Some(view) = &self.0 {
                view.handle_requests(to_node(node.requester()));
            }
        }

        /// Viewers' goals one after the other, each with a flag that says that it was cancelled, until `stop`.
        pub fn answer_goals(&self, stop: &AtomicBool, mut each: impl FnMut(Goal, &AtomicBool)) {
            let Some(view) = &self.0 else { return };
            let (goals_in, goals): (_, Receiver<Goal>) = sync_channel(4);
            let cancelled = Arc::new(AtomicBool::new(false));
            let cancel = cancelled.clone();
            view.handle_requests(Box::new(move |request| match request {
                Request::Ask(goal) => goals_in.try_send(goal).map_err(|_| RequestError::Busy),
                Request::Cancel => {
                    cancel.store(true, Ordering::Relaxed);
                    Ok(())
                }
            }));
            while !stop.load(Ordering::Relaxed) {
                if let Ok(goal) = goals.recv_timeout(Duration::from_millis(100)) {
                    cancelled.store(false, Ordering::Relaxed);
                    each(goal, &cancelled);
                }
            }
        }
    }
}

#[cfg(not(feature = "view"))]
mod none {
    use super::*;

    /// This program has no page.
    #[derive(Args, Clone, Debug)]
    pub struct ViewArgs {}

    impl ViewArgs {
        pub fn open(&self, _: &str, _: Option<&Pipeline>) -> anyhow::Result<Page> {
            Ok(Page)
        }

        pub fn channels(&self, _: Option<crate::record::RecordSender>, _: &str) -> anyhow::Result<Channels> {
            Ok(Channels)
        }
    }

    pub struct Channels;

    impl Channels {
        pub fn observer(&self) -> Option<Observer> {
            None
        }

        pub fn is_live(&self) -> bool {
            false
        }
    }

    /// This program writes no report.
    #[derive(Args, Clone, Debug)]
    pub struct ReportArgs {}

    impl ReportArgs {
        pub fn open(&self, _: &str, _: Option<&Pipeline>) -> anyhow::Result<Report> {
            Ok(Report)
        }
    }

    pub struct Report;

    impl Report {
        pub fn observer(&self) -> Option<Observer> {
            None
        }

        pub fn write(&self, _: impl FnOnce() -> Facts) -> anyhow::Result<Option<std::path::PathBuf>> {
            Ok(None)
        }
    }

    pub struct Page;

    impl Page {
        pub fn is_open(&self) -> bool {
            false
        }

        pub fn observer(&self) -> Option<Observer> {
            None
        }

        pub fn serve(&self, _: &Node) {}

        pub fn answer_goals(
            &self,
            _: &std::sync::atomic::AtomicBool,
            _: impl FnMut(mindseye_bridge::goal::Goal, &std::sync::atomic::AtomicBool),
        ) {
        }
    }
}
