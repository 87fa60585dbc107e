// The watchdog: a second, tiny process that kills the plugin when it hangs, whatever state it is in. A hung NBD server would hang the guests.
// main.ts starts it; it is fed from the main loop, and only while no worker hangs. It never restarts anything: systemd does.
export { Watchdog } from './watch.ts'
