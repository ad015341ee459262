//! Start with a chain of 1 TiB images: the time from exec(2) to the first sector that is read, and the peak memory.

use std::path::Path;

use crate::compare::{Bench, Candidate};
use crate::disks::Format;
use crate::harness::Bound;
use crate::sample::Sample;
use crate::server::Server;

pub fn start(bench: &mut Bench) {
    for layers in [1, 64] {
        let name = format!("1 TiB, {layers} layers, exec to first read");
        let once = |format: Format, image: &Path| {
            let server = Server::start(&format.server(), image);
            let mut guest = server.connect(1);
            guest.read(1 << 39, 4096).expect("the disk can be read");
            let mut sample = Sample::time(server.started.elapsed());
            // `cpu` contains the peak memory in KiB here, instead of the processor time.
            sample.cpu = (server.memory().1 >> 10) as f64;
            drop(guest);
            server.stop();
            sample
        };
        let (vhd, qcow2) =
            (bench.disks.sparse_chain(Format::Vhd, layers), bench.disks.sparse_chain(Format::Qcow2, layers));
        let all = vec![
            Candidate::new("diffdiskd", || once(Format::Vhd, &vhd)),
            Candidate::new("QSD qcow2", || once(Format::Qcow2, &qcow2)),
        ];
        bench.compare(&name, all);
        let ratio = bench.results.ratio(&name, "diffdiskd", "QSD qcow2", |s| s.mean);
        bench.results.target(format!("{name}: diffdiskd / QSD qcow2"), ratio, Bound::AtMost(1.0));
        if layers == 64 {
            let mebibytes = bench.results.row(&name, "diffdiskd").median(|s| s.cpu) / 1024.0;
            bench.results.target(
                "1 TiB, 64 layers: resident MiB of diffdiskd at its highest",
                mebibytes,
                Bound::AtMost(32.0),
            );
        }
    }
}
