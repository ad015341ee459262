//! Statistics of a disk that this process serves over its real socket: all counts equal what the client has sent.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use diffdisk::disk::statistics::{DiskStatistics, RequestKind, prometheus_text};
use diffdisk::disk::{Disk, DiskOptions};
use diffdisk::image::{ImageKind, ImageSpec, create};
use diffdisk::storage::EngineKind;
use diffdisk::storage::host::Host;
use diffdisk::units::BlockSize;
use diffdisk::vhost::{DiskServer, ServeOptions, ServerStatus, Socket, SocketAccess};

use super::client::{Client, Command, Options};
use super::rng::Rng;

const MIB: u64 = 1 << 20;
/// Size of the disk.
const SIZE: u64 = 16 * MIB;
/// Unit of requests. Each page is read from one layer, or from none.
const PAGE: u64 = 4096;
/// Number of pages that the root has: those of the first half of the disk. A root has whole blocks.
const ROOT_PAGES: u64 = SIZE / PAGE / 2;
/// A page that the root has, and that is zeroed. From then on the child has it.
const ZEROED_PAGE: u64 = 258;
const QUEUES: usize = 2;
/// Requests in flight.
const DEPTH: usize = 24;

/// A disk that a thread of this process serves.
pub(super) struct Served {
    pub(super) disk: Arc<Disk>,
    pub(super) status: Arc<ServerStatus>,
    stop: UnixStream,
    server: JoinHandle<()>,
}

impl Served {
    pub(super) fn start(image: &Path, socket: &Path, change: impl FnOnce(&mut DiskOptions)) -> Served {
        let mut options = DiskOptions::new(image);
        change(&mut options);
        let disk = Disk::open(Arc::new(Host), &options).unwrap_or_else(|e| panic!("{}", e.line()));
        let serve = ServeOptions {
            name: "counted".into(),
            queues: QUEUES as u16,
            queue_size: 128,
            engine: EngineKind::Auto,
            poll: Duration::ZERO,
            write_back: true,
        };
        let socket = Socket::bind(socket, SocketAccess::default()).unwrap_or_else(|e| panic!("{}", e.line()));
        let server = DiskServer::new(disk.clone(), &serve, socket).unwrap_or_else(|e| panic!("{}", e.line()));
        let status = server.status().clone();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || server.run(stopped).unwrap_or_else(|e| panic!("{}", e.line())));
        Served { disk, status, stop, server }
    }

    pub(super) fn connect(&self, socket: &Path) -> Client {
        Client::connect_with(socket, &Options { queues: QUEUES, depth: DEPTH, ..Options::default() }).unwrap()
    }

    /// Ends the server and its lanes. The disk, and its statistics, remain.
    pub(super) fn end(self) -> Arc<Disk> {
        drop(self.stop);
        self.server.join().unwrap();
        self.disk
    }
}

/// The counts of one kind of requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Sent {
    requests: u64,
    bytes: u64,
}

/// What the client has sent, by queue and kind, and what the layers must have answered: the child, the root, none.
#[derive(Default)]
struct Expected {
    sent: [[Sent; RequestKind::ALL.len()]; QUEUES],
    read: [u64; 3],
    written: u64,
}

impl Expected {
    fn add(&mut self, queue: usize, kind: RequestKind, bytes: u64) {
        let sent = &mut self.sent[queue][kind as usize];
        sent.requests += 1;
        sent.bytes += bytes;
    }

    /// Compares the statistics of queues and kinds with what was sent.
    fn check_requests(&self, statistics: &DiskStatistics) {
        assert_eq!(statistics.queues.len(), QUEUES);
        for (index, queue) in statistics.queues.iter().enumerate() {
            assert_eq!((queue.queue, queue.in_flight), (Some(index as u32), 0));
            for (kind, got) in queue.requests.by_kind() {
                let sent = self.sent[index][kind as usize];
                assert_eq!(Sent { requests: got.requests, bytes: got.bytes }, sent, "queue {index}, {kind:?}");
                assert_eq!((got.latency.count(), got.errors), (sent.requests, 0), "queue {index}, {kind:?}");
            }
        }
        let total = |kind: RequestKind| self.sent.iter().map(|queue| queue[kind as usize].requests).sum::<u64>();
        for (kind, got) in statistics.total.requests.by_kind() {
            assert_eq!((got.requests, got.latency.count()), (total(kind), total(kind)), "{kind:?}");
            if got.requests > 0 {
                let quantiles = [0.0, 0.5, 0.99, 1.0].map(|q| got.latency.quantile(q).unwrap());
                assert!(quantiles.is_sorted() && quantiles[3] < 30_000_000_000, "{kind:?}: {quantiles:?}");
            }
        }
    }

    /// Compares the statistics of layers with what they must have answered.
    fn check_layers(&self, statistics: &DiskStatistics) {
        let read = |n: usize| statistics.layers[n].read_bytes + statistics.layers[n].copied_bytes;
        assert_eq!([read(0), read(1), statistics.total.zero_filled_bytes], self.read, "child, root, none");
        let writes = [0, 1].map(|n: usize| (statistics.layers[n].writes, statistics.layers[n].written_bytes));
        let of_kind = |queue: &[Sent; 5]| queue[RequestKind::Write as usize].requests;
        let sent = self.sent.iter().map(of_kind).sum::<u64>();
        assert!(writes[0].0 >= sent, "a write of two blocks takes two operations");
        assert_eq!((writes[0].1, writes[1]), (self.written, (0, 0)));
    }
}

/// Waits for all requests in flight.
fn finish(guest: &mut Client) {
    while guest.in_flight() > 0 {
        guest.wait().unwrap().result.unwrap();
    }
}

/// Creates a root with data in its first half, and a child of it. Returns the path of the child.
fn make_chain(folder: &Path, socket: &Path) -> std::path::PathBuf {
    let (root, child) = (folder.join("root.vhd"), folder.join("child.vhd"));
    let spec = ImageSpec { kind: ImageKind::Dynamic, size: SIZE, block_size: BlockSize::DEFAULT, reserve: 0 };
    create(&Host, &root, &spec).unwrap_or_else(|e| panic!("{}", e.line()));
    let served = Served::start(&root, socket, |_| ());
    let mut guest = served.connect(socket);
    for page in (0..ROOT_PAGES).step_by(3) {
        if !guest.has_room() {
            finish(&mut guest);
        }
        guest.submit(0, Command::Write { offset: page * PAGE, data: &[7; PAGE as usize] }).unwrap();
    }
    finish(&mut guest);
    let pages = ROOT_PAGES.div_ceil(3);
    let statistics = served.disk.statistics();
    assert_eq!(statistics.total.requests.write.bytes, pages * PAGE);
    assert_eq!((statistics.layers[0].writes, statistics.layers[0].written_bytes), (pages, pages * PAGE));
    drop(guest);
    served.end();
    let created = assert_cmd::Command::new(assert_cmd::cargo::cargo_bin!("diffdisk"))
        .args(["create", "--quiet"])
        .arg(&child)
        .arg("--parent")
        .arg(&root)
        .output()
        .unwrap();
    assert!(created.status.success(), "{created:?}");
    child
}

/// Requests of all kinds on two queues, with reads and writes of random ranges. Requests in flight at the same time are
/// of one kind, so it is known from which layer each page is read.
#[test]
fn statistics_equal_what_the_client_has_sent() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let child = make_chain(folder.path(), &socket);
    let served = Served::start(&child, &socket, |_| ());
    let mut guest = served.connect(&socket);
    let mut rng = Rng::from_env("statistics_equal_what_the_client_has_sent");
    let mut expected = Expected::default();
    // The layer from which each page is read: the child (0), the root (1), none (2).
    let mut owner: Vec<usize> = (0..SIZE / PAGE).map(|page| if page < ROOT_PAGES { 1 } else { 2 }).collect();
    for round in 0..60 {
        let kind = [RequestKind::Read, RequestKind::Read, RequestKind::Write][round % 3];
        for _ in 0..DEPTH {
            let pages = 1 + rng.below(8);
            let (queue, first) = (rng.below(QUEUES as u64) as usize, rng.below(SIZE / PAGE - pages));
            let (offset, len) = (first * PAGE, pages * PAGE);
            let mine = first as usize..(first + pages) as usize;
            expected.add(queue, kind, len);
            if kind == RequestKind::Read {
                mine.for_each(|page| expected.read[owner[page]] += PAGE);
                guest.submit(queue, Command::Read { offset, len: len as usize }).unwrap();
            } else {
                owner[mine].fill(0);
                expected.written += len;
                guest.submit(queue, Command::Write { offset, data: &vec![round as u8; len as usize] }).unwrap();
            }
        }
        finish(&mut guest);
        for (queue, kind, command) in [
            (round % 2, RequestKind::Flush, Command::Flush),
            (1, RequestKind::Discard, Command::Discard { offset: 0, len: 3 * PAGE }),
            (
                0,
                RequestKind::WriteZeroes,
                Command::WriteZeroes { offset: ZEROED_PAGE * PAGE, len: PAGE, unmap: round % 2 == 0 },
            ),
        ] {
            let bytes = [0, 3 * PAGE, PAGE][kind as usize - RequestKind::Flush as usize];
            expected.add(queue, kind, bytes);
            guest.submit(queue, command).unwrap();
            finish(&mut guest);
        }
        owner[ZEROED_PAGE as usize] = 0;
        let statistics = served.disk.statistics();
        expected.check_requests(&statistics);
        expected.check_layers(&statistics);
        if round == 30 {
            drop(guest);
            guest = served.connect(&socket);
        }
    }
    let past_the_end = Command::Read { offset: SIZE, len: 512 };
    assert!(guest.run(past_the_end).is_err_and(|e| e.kind() != ErrorKind::TimedOut));
    let statistics = served.disk.statistics();
    assert_eq!((statistics.total.refused, statistics.queues[0].refused), (1, 1));
    assert!(statistics.layers[0].zeroed_bytes > 0 && statistics.commits > 0);
    assert!(statistics.gauges.merge_debt_bytes > 0 && statistics.gauges.reserved_bytes.is_some());
    check_texts(&statistics);
    drop(guest);
    let disk = served.end();
    expected.check_requests(&disk.statistics());
    expected.check_layers(&disk.statistics());
}

/// Compares the JSON and Prometheus reports with the statistics.
fn check_texts(statistics: &DiskStatistics) {
    let read = &statistics.total.requests.read;
    let json = serde_json::to_value(statistics).unwrap();
    assert_eq!(json["total"]["requests"]["read"]["requests"], read.requests);
    assert_eq!(json["total"]["requests"]["read"]["latency"]["count"], read.requests);
    assert_eq!(json["layers"][1]["read_bytes"], statistics.layers[1].read_bytes);
    let text = prometheus_text(&[("counted", statistics)]);
    let sum: u64 = text
        .lines()
        .filter(|line| line.starts_with("diffdisk_requests_total{") && line.contains("kind=\"read\""))
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
        .sum();
    assert_eq!(sum, read.requests);
    let count = format!("diffdisk_request_duration_seconds_count{{disk=\"counted\",kind=\"read\"}} {sum}");
    assert!(text.lines().any(|line| line == count), "{count} is missing in\n{text}");
}

/// One flush at a time, each after a write. The daemon's time is a part of the time that the client measures.
#[test]
fn the_times_of_flushes_are_within_those_of_the_client() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let child = make_chain(folder.path(), &socket);
    let served = Served::start(&child, &socket, |_| ());
    let mut guest = served.connect(&socket);
    let mut times = Vec::new();
    for n in 0..100 {
        guest.write(n % 16 * MIB, &[n as u8; 512]).unwrap();
        let begun = Instant::now();
        guest.flush().unwrap();
        times.push(begun.elapsed().as_nanos() as u64);
    }
    times.sort_unstable();
    let statistics = served.disk.statistics();
    let latency = &statistics.total.requests.flush.latency;
    assert_eq!(latency.count(), 100);
    for (q, at) in [(0.5, 49), (0.9, 89), (0.99, 98)] {
        let (counted, measured) = (latency.quantile(q).unwrap(), times[at]);
        println!("flushes, quantile {q}: the daemon counts {counted} ns, the client measures {measured} ns");
        // A step of the histogram is a sixteenth wide.
        assert!(counted <= measured + measured / 16, "{q}: {counted} ns, but the client measures {measured} ns");
    }
    assert!(latency.sum_nanos <= times.iter().sum());
    drop(guest);
    served.end();
}
