// Browsers give a page that was opened from the disk no workers, and the search is one. It then runs in a hidden frame,
// and gets and sends the same messages. Stands where the theme would fetch such a script from the network.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.onload = () => {
        const inside = frame.contentWindow
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
        inside.importScripts = () => Promise.resolve()  // of other languages than English
        const script = inside.document.createElement("script")
        script.src = new URL(url, location)
        script.onload = () => {
          this.inside = inside
          this.waiting.splice(0).forEach(data => this.postMessage(data))
        }
        inside.document.body.append(script)
      }
      document.body.append(frame)
    }

    postMessage(data) {
      if (this.inside) this.inside.dispatchEvent(new MessageEvent("message", { data }))
      else this.waiting.push(data)
    }
  }
}
