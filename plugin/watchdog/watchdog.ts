// The watchdog process. The plugin proves each 200 ms, by a byte on this process's stdin, that its main loop turns; the main loop does so only
// while every worker's does. When nothing comes for the time given, the plugin is killed: its sockets close, QEMU stops its jobs, guests go on.
// When stdin ends, the plugin is gone and so is this process. It knows nothing else, allocates nothing, and works while the plugin is stopped.
const [pidText, limitText] = process.argv.slice(2)
const pid = Number(pidText)
const limitMs = Number(limitText)
let lastMs = performance.now()

process.stdin.on('data', () => (lastMs = performance.now()))
process.stdin.on('end', () => process.exit(0))

const CHECK_MS = 50
let checkedMs = performance.now()
setInterval(() => {
  const nowMs = performance.now()
  // Who was held up himself (a frozen host or control group) has to read first what has come meanwhile.
  if (nowMs - checkedMs > limitMs / 2) lastMs = nowMs
  checkedMs = nowMs
  if (nowMs - lastMs < limitMs) return
  try {
    process.kill(pid, 'SIGKILL')
  } catch (error) {
    process.stderr.write(`watchdog: ${String(error)}\n`)
  }
  process.stderr.write(`watchdog: pve-cdp plugin (pid ${pid}) gave no sign of life for ${Math.round(performance.now() - lastMs)} ms and was killed\n`)
  process.exit(1)
}, CHECK_MS)
