"use strict";
(function () {
  var root = document.documentElement;
  var button = document.getElementById("theme");
  function dark() {
    var set = root.getAttribute("data-theme");
    return set ? set === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  }
  function label() { button.textContent = dark() ? "Light" : "Dark"; }
  button.hidden = false;
  button.addEventListener("click", function () {
    root.setAttribute("data-theme", dark() ? "light" : "dark");
    label();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();

  document.querySelectorAll("table.sortable").forEach(function (table) {
    var body = table.tBodies[0];
    table.querySelectorAll("thead th[data-column]").forEach(function (head) {
      var column = Number(head.getAttribute("data-column"));
      var press = document.createElement("button");
      press.type = "button";
      press.textContent = head.textContent;
      head.textContent = "";
      head.appendChild(press);
      press.addEventListener("click", function () {
        var up = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("th[aria-sort]").forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        var rows = Array.prototype.slice.call(body.rows).map(function (row) {
          return { row: row, value: row.cells[column].getAttribute("data-value") };
        });
        rows.sort(function (a, b) {
          if (a.value === "" || b.value === "") { return (a.value === "") - (b.value === ""); }
          var x = Number(a.value), y = Number(b.value);
          var order = isNaN(x) || isNaN(y) ? a.value.localeCompare(b.value) : x - y;
          return up ? order : -order;
        });
        rows.forEach(function (item) { body.appendChild(item.row); });
      });
    });
  });
})();
